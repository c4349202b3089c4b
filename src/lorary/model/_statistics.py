"""The statistics of a calibration pass: gradients of weights, and moments of inputs, of a group of layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError
from lorary.kernels.torch_internals import parameters_of, version_of
from lorary.layers.experts import ExpertMatrix
from lorary.layers.kinds import KINDS
from lorary.layers.wrappers import submodule
from lorary.model.out_of_memory import is_out_of_memory
from lorary.spec.calibration import CalibratedInit, Moments, Statistic
from lorary.spec.placement import AdaptedSite

Loss = Callable[[Any, Any], Tensor]
HEADLINE = "cannot calibrate:"
Layers = Mapping[str, tuple[nn.Module, AdaptedSite]]


def first_rows(data: Iterable[Any], rows: int) -> list[Any]:
    """The first batches that hold as many rows, or all that there are.

    Raises:
        PlanError: there are none, or one is no batch.
    """
    taken: list[Any] = []
    seen = 0
    for batch in data:
        size = _rows(batch)
        if size is None:
            what = f"batch {len(taken)} is a {type(batch).__name__} without a tensor"
            fix = "a batch is a tensor, a tuple of tensors, or a mapping of the model's arguments"
            raise PlanError(HEADLINE, [Diagnostic("data", what, fix)])
        taken.append(batch)
        seen += size
        if seen >= rows:
            break
    if not seen:
        raise PlanError(HEADLINE, [Diagnostic("data", "is empty", "pass at least one batch with rows")])
    return taken


def _tensors(batch: Any) -> Iterator[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    yield from (value for value in values if isinstance(value, Tensor))


def _rows(batch: Any) -> int | None:
    """How many rows a batch has; None if it has no tensor."""
    first = next(_tensors(batch), None)
    return None if first is None else len(first) if first.dim() else 1


def _on(device: torch.device, batch: Any) -> Any:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    return tuple(map(move, batch)) if isinstance(batch, list | tuple) else move(batch)


def _output(model: nn.Module, batch: Any, i: int) -> Any:
    """The model's output for batch i.

    Raises:
        PlanError: the model refuses it, with the model's own reason.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        what = f"batch {i} fails in the model's forward pass: {type(error).__name__}: {reason}"
        raise PlanError(HEADLINE, [Diagnostic("data", what, "pass what the model itself takes")]) from error


def _kept_tokens(batch: Any, labelled_only: bool) -> Tensor | None:
    """[rows, tokens] bool: the tokens whose inputs count; None for all of them."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    kept = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if labelled_only and isinstance(labels, Tensor) and labels.dim() == 2:
        kept = labels != -100 if kept is None else kept & (labels != -100)
    return kept


# --- the pass -------------------------------------------------------------------------------------------------------


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with nothing trainable: a start depends on no dropout, and no gradient is kept."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trains in flags:
            parameter.requires_grad_(trains)


def measure(
    model: nn.Module, init: CalibratedInit, group: list[AdaptedSite], batches: list[Any], loss: Loss | None
) -> dict[str, Statistic | None]:
    """site -> what this init reads there, over all batches; None where nothing ran."""
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    layers = {p.site.name: (submodule(model, p.site.name), p) for p in group}
    if init.reads == "gradient":
        sums: dict[str, Tensor] = {}
        with _gradients(model, layers, sums), torch.enable_grad():
            for i, batch in enumerate(batches):
                batch = _on(device, batch)
                _loss(_output(model, batch, i), batch, loss).backward()
            return {name: _as_matrix(*layers[name], sums.get(name)) for name in layers}
    inputs: dict[str, Moments | None] = dict.fromkeys(layers)
    same = _LastMoments(init)
    with _input_hooks(layers, inputs, same), torch.no_grad():
        for i, batch in enumerate(batches):
            batch = _on(device, batch)
            same.kept = _kept_tokens(batch, init.labelled_only)
            _output(model, batch, i)
    return dict(inputs)


def _loss(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch.

    Raises:
        PlanError: there is none, or it does not depend on the layers.
    """
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = (
            "the model's output has no loss" if loss is None else f"`loss` returned {type(value).__name__}, no number"
        )
        fix = "put `labels` into the batches, or pass loss=(output, batch) -> number"
        raise PlanError(HEADLINE, [Diagnostic("data", what, fix)])
    if not value.requires_grad:
        what = "the loss depends on none of the adapted layers"
        raise PlanError(HEADLINE, [Diagnostic("data", what, "adapt layers that run in the model's forward pass")])
    return value


@contextmanager
def _gradients(model: nn.Module, layers: Layers, sums: dict[str, Tensor]) -> Iterator[None]:
    """Within it, every backward pass adds the gradients of these layers' weights to `sums`, in their layout.

    Each layer gets a parameter of its own over the same memory, so that a tied weight counts this layer's use alone,
    and each gradient is freed when it was added.
    """
    homes = {name: _home(model, name, layer) for name, (layer, _) in layers.items()}
    weights = {name: owner[leaf] for name, (owner, leaf) in homes.items()}

    def added(name: str, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
        parameter.grad = None

    try:
        for name, (owner, leaf) in homes.items():
            own = nn.Parameter(cast(nn.Parameter, weights[name]).detach())
            own.register_post_accumulate_grad_hook(lambda parameter, name=name: added(name, parameter))
            owner[leaf] = own
        yield
    finally:
        for name, (owner, leaf) in homes.items():
            owner[leaf] = weights[name]


def _home(model: nn.Module, name: str, layer: nn.Module) -> tuple[dict[str, nn.Parameter | None], str]:
    """The dictionary of parameters that holds a layer's weight, and its name there."""
    if isinstance(layer, ExpertMatrix):
        owner, _, leaf = name.rpartition(".")
        return parameters_of(submodule(model, owner)), leaf
    return parameters_of(layer), "weight"


def _as_matrix(layer: nn.Module, p: AdaptedSite, gradient: Tensor | None) -> Tensor | None:
    """A gradient as [out, in]; None if there is none."""
    if gradient is None:
        return None
    parameters_of(layer)["weight"] = nn.Parameter(gradient, requires_grad=False)  # `_gradients` restores it
    return KINDS[p.site.kind].matrix(layer).detach()


@dataclasses.dataclass
class _LastMoments:
    """The moments of the last input seen: layers that read the same tensor (q, k and v) share one product."""

    init: CalibratedInit
    kept: Tensor | None = None
    x: Tensor | None = None
    version: int = 0
    moments: Moments | None = None

    def of(self, x: Tensor) -> Moments | None:
        if self.x is not x or self.version != version_of(x):
            self.x, self.version, self.moments = x, version_of(x), self._of_rows(x.detach())
        return self.moments

    def _of_rows(self, x: Tensor) -> Moments | None:
        kept = self.kept if self.kept is not None and self.kept.shape == x.shape[:-1] else None
        rows = x.flatten(1, -2) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])  # a batch without tokens is one row
        found = None
        for i, X in enumerate(rows):
            X = X if kept is None else X[kept[i].to(X.device)]
            if not len(X):
                continue
            X = self.init.prepared(X.to(torch.promote_types(X.dtype, torch.float32)))
            found = _sum(found, Moments(1, len(X), X.sum(0), X.T @ X))
        return found


def _sum(one: Moments | None, other: Moments | None) -> Moments | None:
    if one is None or other is None:
        return other if one is None else one
    return Moments(
        one.rows + other.rows, one.count + other.count, one.total + other.total, one.products + other.products
    )


@contextmanager
def _input_hooks(layers: Layers, inputs: dict[str, Moments | None], same: _LastMoments) -> Iterator[None]:
    """Within it, every forward pass adds the inputs of these layers."""

    def add(name: str, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(given.values()))
        inputs[name] = _sum(inputs[name], same.of(x))

    handles = []
    try:
        for name, (layer, _) in layers.items():
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, given, name=name: add(name, args, given), with_kwargs=True
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
