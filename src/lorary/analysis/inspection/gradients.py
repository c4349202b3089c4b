"""first_gradients: which tensors of an adapter the first step reaches, and what it changes.

A factor that starts at zero blocks the gradient of its partner: with B = 0, dL/dA = s B^T G is zero, and only B moves.
PiSSA and OLoRA start at a part of W, so that both move; VeRA's d waits for b, AdaLoRA's P and Q for E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError, TrainingError, deduplicated, not_a
from lorary.files.strict_json import finite
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model.ambient import mode_independent
from lorary.model.state import base_parameter, require_attached, require_values
from lorary.model.text_table import aligned
from lorary.spec.join import not_mergeable
from lorary.spec.presets import presets_of

HEAD = ("role", "tensors", "starts at", "gradient", "first step", "with a gradient")
SITE_HEAD = ("site", "gradients", "‖ΔW‖/‖W‖ of the first step")
_HEADLINE = "cannot measure the first gradients:"


@dataclass(frozen=True)
class TensorStep:
    """A trained tensor in the first step. All norms are Frobenius norms.

    Args:
        start: the norm of its first value.
        gradient: the norm of its gradient, before clipping.
        step: the norm of its change.
    """

    start: float
    gradient: float
    step: float


@dataclass(frozen=True)
class SiteStep:
    """One adapted layer in the first step.

    Args:
        site: its name.
        roles: role -> its trained tensor.
        effect: ||W1 - W0|| / ||W0||, with W0 the effective weight before the step.
    """

    site: str
    roles: Mapping[str, TensorStep]
    effect: float


@dataclass(frozen=True)
class FirstGradients:
    """The first step of an adapter. Prints as a table of the roles.

    Args:
        method: its presets.
        sites: the adapted layers, in the order of the model.
        full: base parameter -> the same, of those that train in full.
        notes: remarks.
    """

    method: str
    sites: tuple[SiteStep, ...] = field(repr=False)
    full: Mapping[str, TensorStep] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, list[TensorStep]]:
        """role -> the tensors of all sites; `full` -> the base parameters that train in full."""
        found: dict[str, list[TensorStep]] = {}
        for site in self.sites:
            for role, tensor in site.roles.items():
                found.setdefault(role, []).append(tensor)
        return found | ({"full": list(self.full.values())} if self.full else {})

    @property
    def moving(self) -> list[str]:
        """The roles that have a gradient."""
        return [role for role, tensors in self.roles.items() if any(t.gradient for t in tensors)]

    @property
    def verdict(self) -> str:
        """The roles that have a gradient, and those that wait for them, in a sentence."""
        still = [role for role in self.roles if role not in self.moving]
        if not self.moving:
            return "no trained tensor has a gradient: the adapter cannot learn from this batch"
        verb = "has" if len(self.moving) == 1 else "have"
        told = f"{' and '.join(self.moving)} {verb} a gradient in the first step"
        if not still:
            return f"all that trains: {told}"
        zeros = [role for role in self.moving if not any(t.start for t in self.roles[role])]
        because = f", because {' and '.join(zeros)} {'is' if len(zeros) == 1 else 'are'} still zero" if zeros else ""
        return f"only {told}: that of {' and '.join(still)} is zero{because}"

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of a table under `HEAD`, one for each role."""
        return [
            (
                role,
                str(len(tensors)),
                _number(_norm(t.start for t in tensors)),
                _number(_norm(t.gradient for t in tensors)),
                _number(_norm(t.step for t in tensors)),
                _share(tensors),
            )
            for role, tensors in self.roles.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        return {
            "method": self.method,
            "moving": self.moving,
            "roles": {
                role: {name: _norm(getattr(t, name) for t in tensors) for name in ("start", "gradient", "step")}
                for role, tensors in self.roles.items()
            },
            "sites": [
                finite({"site": s.site, "effect": s.effect}) | {"roles": {r: vars(t) for r, t in s.roles.items()}}
                for s in self.sites
            ],
            "full": {name: vars(t) for name, t in self.full.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join([*aligned([HEAD, *self.rows()]), self.verdict, *(f"note: {note}" for note in self.notes)])


@mode_independent
def first_gradients(model: nn.Module, step: Callable[[], object]) -> FirstGradients:
    """The gradients of the first step by role, and what the step changes. The adapter is as before afterwards.

    Args:
        model: with a method attached that has not been trained.
        step: makes one step: forward, backward, and the optimizer's step. Without the latter only gradients are
            measured. Gradients that are accumulated over several backward passes count together.

    Raises:
        StateError: nothing is attached, the model has no values, a layer has no effective weight, or the step changes
            the ranks.
        TrainingError: no backward pass has reached a trained tensor, or a gradient is not finite; every tensor.

    >>> print(first_gradients(model, lambda: model(**batch).loss.backward()))
    """
    if problems := not_a(Callable, "a function that makes a step", step=step):
        raise StateError(_HEADLINE, problems)
    state = require_attached(model, "measure")
    require_values(model)
    layers = adapted_layers(model)
    if problems := not_mergeable((name, layer.join) for name, layer in layers.items()):
        raise StateError(_HEADLINE, problems)  # a step changes no weight there
    trained = {(name, role): p for name, layer in layers.items() for role, p in layer.params.items() if p.requires_grad}
    full = {name: p for name in state.full if (p := base_parameter(model, name)).requires_grad}
    before = {name: {role: p.detach().clone() for role, p in layer.params.items()} for name, layer in layers.items()}
    full_before = {name: base_parameter(model, name).detach().clone() for name in state.full}
    with _gradient_norms([*trained.values(), *full.values()]) as norms:
        step()
    _check(trained, full, norms)
    _check_shapes(layers, before)

    def measured(p: nn.Parameter, start: Tensor) -> TensorStep:
        return TensorStep(_norm_of(start), norms.get(p, 0.0), _norm_of(p.detach() - start.to(p.device)))

    found = {key: measured(p, before[key[0]][key[1]]) for key, p in trained.items()}
    parts = {name: measured(p, full_before[name]) for name, p in full.items()}
    effects = _effects(model, layers, before, full_before)
    sites = tuple(
        SiteStep(name, {role: found[name, role] for role in layer.params if (name, role) in found}, effects[name])
        for name, layer in layers.items()
    )
    return FirstGradients(",".join(presets_of(state.method)), sites, parts)


@contextmanager
def _gradient_norms(parameters: list[nn.Parameter]) -> Iterator[dict[nn.Parameter, float]]:
    """parameter -> the norm of its gradient after the last backward pass of the block, before it is clipped."""
    norms: dict[nn.Parameter, float] = {}

    def note(p: nn.Parameter) -> None:
        norms[p] = 0.0 if p.grad is None else _norm_of(p.grad)

    with ExitStack() as stack:
        for p in dict.fromkeys(parameters):
            stack.callback(p.register_post_accumulate_grad_hook(note).remove)
        yield norms


@torch.no_grad()
def _effects(
    model: nn.Module,
    layers: Mapping[str, Adapted],
    before: Mapping[str, Mapping[str, Tensor]],
    full_before: Mapping[str, Tensor],
) -> dict[str, float]:
    """site -> the relative change of its effective weight. Gives the model its first values back."""
    after = {name: layer.merged()[0].cpu() for name, layer in layers.items()}
    for name, value in full_before.items():
        base_parameter(model, name).copy_(value)
    for name, layer in layers.items():
        layer.load(before[name])
    found = {}
    for name, layer in layers.items():
        W0 = layer.merged()[0].cpu()
        found[name] = _norm_of(after[name] - W0) / (_norm_of(W0) or 1.0)
    return found


def _check(
    trained: Mapping[tuple[str, str], nn.Parameter],
    full: Mapping[str, nn.Parameter],
    norms: Mapping[nn.Parameter, float],
) -> None:
    """Refuse a step without a backward pass, and gradients that are not finite.

    Raises:
        TrainingError: every reason.
    """
    if not norms:
        what, fix = "no backward pass has reached a trained tensor", "call loss.backward() in it"
        raise TrainingError(_HEADLINE, [Diagnostic("step", what, fix)])
    names = {p: f"{site}.{role}" for (site, role), p in trained.items()} | {p: name for name, p in full.items()}
    bad = [name for p, name in names.items() if not math.isfinite(norms.get(p, 0.0))]
    if bad:
        raise TrainingError(_HEADLINE, [Diagnostic(name, "its gradient is not finite") for name in bad])


def _check_shapes(layers: Mapping[str, Adapted], before: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a step that has removed rank directions, as AdaLoRA's last one does.

    Raises:
        StateError: every layer.
    """
    resized = [
        name
        for name, layer in layers.items()
        if any(p.shape != before[name][role].shape for role, p in layer.params.items())
    ]
    if resized:
        what, fix = "the step has changed its rank", "make the first step of a run of many"
        raise StateError(_HEADLINE, deduplicated(Diagnostic(name, what, fix) for name in resized))


def _share(tensors: list[TensorStep]) -> str:
    """The share of the tensors that have a gradient, in words."""
    count = sum(t.gradient > 0 for t in tensors)
    return "all" if count == len(tensors) else "none" if not count else f"{count} of {len(tensors)}"


def _norm(norms: Any) -> float:
    """The norm of several tensors together."""
    return math.hypot(*norms)


def _norm_of(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.float64))


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "0"
