"""The proof that no row of a shared forward pass meets another one: the gradients are those of training alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, TrainingError
from lorary.kernels.low_rank import autocasting
from lorary.layers.adapted import adapted_layers
from lorary.train.shared_base.rows import HEADLINE

_SMALL = 1e-3  # a parameter whose gradient is this share of the whole is compared with the whole


def check_gradients(
    name: str, model: nn.Module, parameters: Sequence[nn.Parameter], loss_alone: Callable[[], Tensor]
) -> None:
    """Compare the gradients of an adapter with those that it has alone; afterwards it has none.

    Args:
        name: of the adapter.
        model: its own.
        parameters: those that train, with the gradients of the shared backward pass.
        loss_alone: its loss on the same batch, by a forward pass of its own.

    Raises:
        TrainingError: they differ by more than rounding: rows have met, or the base computes other rows otherwise.
    """
    together = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    loss_alone().backward()
    by_itself = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    if not all(g is None or bool(g.isfinite().all()) for g in (*together, *by_itself)):
        return  # numbers that are not finite end the adapter's training
    pairs = zip(parameters, together, by_itself, strict=True)
    errors = {id(p): _difference(one, other) for p, one, other in pairs}
    whole = _norm(by_itself)
    precision = max(torch.finfo(_precision(model)).eps, torch.finfo(torch.float32).eps)
    most = 3 * precision**0.5
    norms = {id(p): _norm([g]) for p, g in zip(parameters, by_itself, strict=True)}
    bounds = {key: norm + _SMALL * whole + torch.finfo(torch.float32).tiny for key, norm in norms.items()}
    bad = {key: error / bounds[key] for key, error in errors.items() if error > most * bounds[key]}
    if bad:
        worst = max(bad, key=lambda key: bad[key])
        what = f"the gradient of {_name_of(model, worst)} is {bad[worst]:.1%} off that of training alone"
        more = f", as are {len(bad) - 1} more" if len(bad) > 1 else ""
        what = f"{what}{more}: its rows meet those of other adapters in this model"
        raise TrainingError(HEADLINE, [Diagnostic(name, what, "train the adapters one by one")])


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return _norm([one, other])
    return float(torch.linalg.vector_norm((one - other).float()))


def _norm(gradients: Sequence[Tensor | None]) -> float:
    found = [torch.linalg.vector_norm(g.float()) for g in gradients if g is not None]
    return float(torch.stack(found).norm()) if found else 0.0


def _precision(model: nn.Module) -> torch.dtype:
    """The coarsest precision in which the base computes."""
    wide = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    device = next(model.parameters()).device
    wide += [torch.get_autocast_dtype(device.type)] if autocasting(device) else []
    return max(wide, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _name_of(model: nn.Module, key: int) -> str:
    for site, layer in adapted_layers(model).items():
        for role, p in layer.params.items():
            if id(p) == key:
                return f"{role} at {site}"
    names = {id(p): name for name, p in model.named_parameters()}
    return names.get(key, "a parameter")
