"""The updates of several adapters by site: products of factors, and dense changes where a join has more than that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.low_rank_form import BaseLayer, factors_on_base, form_without_base
from lorary.errors import Diagnostic
from lorary.layers.adapted import base_parameters, unwrapped_modules
from lorary.model.buffers import persistent_buffers
from lorary.model.checks import layer_mismatches
from lorary.model.state import value_before
from lorary.spec.join import not_mergeable
from lorary.spec.placement import AdaptedSite

_GIVE = "give the base: base=model, or --base"
_FIX = (
    "lorary.mix with approximate=True and base=model (--approximate --base) mixes its closest update of low rank, and "
    "reports the error"
)


@dataclass(frozen=True)
class Term:
    """One adapter of a mix.

    Args:
        name: for errors.
        adapter: the adapter.
        weight: its weight.
    """

    name: str
    adapter: Adapter
    weight: float


class Update(NamedTuple):
    """The update of one adapter at one site of the unmodified base.

    Args:
        weight: of the adapter in the mix.
        B: [out, R], with the scale in it.
        A: [R, in].
        change: for a join with a gain or a shift (DoRA, GLoRA): gives the dense change of the weight [out, in], and
            that of the bias [out] or None. None where the change is B A.
    """

    weight: float
    B: Tensor
    A: Tensor
    change: Callable[[], tuple[Tensor, Tensor | None]] | None = None

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """The change of the weight [out, in] and of the bias [out], in fp32."""
        return (self.B @ self.A, None) if self.change is None else self.change()

    def experts(self) -> list[Update]:
        """The update of each expert, where this is one of all experts of a block."""
        if self.change is None:
            return [Update(self.weight, B, A) for B, A in zip(self.B, self.A, strict=True)]
        whole = functools.cache(self.change)

        def of(e: int) -> Callable[[], tuple[Tensor, Tensor | None]]:
            return lambda: (whole()[0][e], None)

        return [Update(self.weight, self.B[e], self.A[e], of(e)) for e in range(len(self.B))]


def updates_by_site(
    terms: Sequence[Term], base: nn.Module | None, *, approximate: bool
) -> tuple[dict[str, list[Update]], list[Diagnostic]]:
    """site -> the updates of the adapters that have it, and the reasons why some cannot be mixed.

    Args:
        terms: the adapters, in order.
        base: the base, for the joins that depend on its weights.
        approximate: whether dense changes are accepted.
    """
    modules = unwrapped_modules(base) if base is not None else {}
    updates: dict[str, list[Update]] = {}
    problems = []
    for term in terms:
        for adapted in term.adapter.sites:
            name = adapted.site.name
            layer = BaseLayer(base, adapted, modules.get(name))
            update = _update(term, adapted, layer)
            if update.change is not None and (found := _why_not(term, adapted, layer, approximate=approximate)):
                problems += found
            updates.setdefault(name, []).append(update)
    return updates, problems


def _update(term: Term, adapted: AdaptedSite, layer: BaseLayer) -> Update:
    tensors = term.adapter.tensors[adapted.site.name]
    form = form_without_base(adapted, tensors)
    if form is not None and form.is_plain:
        return Update(term.weight, form.B, form.A)
    return Update(term.weight, *factors_on_base(adapted, tensors), lambda: _dense_change(adapted, tensors, layer))


@torch.no_grad()
def _dense_change(
    adapted: AdaptedSite, tensors: Mapping[str, Tensor], layer: BaseLayer
) -> tuple[Tensor, Tensor | None]:
    """(W' - W, b' - b) of the merged layer, computed in 64 bits."""
    W, b = layer.weight().double(), layer.bias()
    B, A = (factor.double() for factor in factors_on_base(adapted, tensors))
    merged, bias = adapted.merged(tensors, W, None if b is None else b.double(), (B, A))
    shift = None if bias is None or b is None else (bias - b).float()
    return (merged - W).float(), shift


def _why_not(term: Term, adapted: AdaptedSite, layer: BaseLayer, *, approximate: bool) -> list[Diagnostic]:
    """Why an update that is more than B A cannot be mixed."""
    name, join = adapted.site.name, type(adapted.join).__name__
    if why := not_mergeable([(name, adapted.join)]):
        return [Diagnostic(name, f"{term.name} has no weight change there: {p.what}", p.fix) for p in why]
    if not approximate:
        return [Diagnostic(name, f"{term.name} gives its output a gain or a shift of its own ({join})", _FIX)]
    if layer.base is None:
        what = f"{term.name} depends on the base's weight there ({join}), and no base is given"
        return [Diagnostic(name, what, _GIVE)]
    if wrong := layer_mismatches(adapted.site, layer.layer):
        return wrong
    if adapted.changes_bias and not adapted.site.bias:
        what = f"{term.name} shifts the output, and the layer has no bias to hold the shift"
        return [Diagnostic(name, what, "merge it into the base instead")]
    return []


# --- parameters trained in full ---------------------------------------------------------------------------------------


class Change(NamedTuple):
    """The change of a base parameter by one adapter.

    Args:
        weight: of the adapter in the mix.
        change: trained minus original value, in fp32.
    """

    weight: float
    change: Tensor


def full_changes(terms: Sequence[Term], base: nn.Module | None) -> tuple[dict[str, list[Change]], list[Diagnostic]]:
    """base parameter -> how the adapters change it, and the reasons why that is unknown."""
    changes: dict[str, list[Change]] = {}
    problems = []
    shapes = _shapes(base) if base is not None and any(term.adapter.full for term in terms) else {}
    for term in terms:
        names = sorted(term.adapter.full)
        if names and base is None:
            what = f"{term.name} trains {len(names)} parameters in full, such as {names[0]}: only changes can be mixed"
            problems.append(Diagnostic("base", what, _GIVE))
            continue
        for name in names:
            value = term.adapter.full[name]
            if base is None or shapes.get(name) != tuple(value.shape):
                what = f"is {tuple(value.shape)} in {term.name}, and {shapes.get(name, 'missing')} in the base"
                problems.append(Diagnostic(name, what, "give the base that it was trained on"))
                continue
            change = value.float().cpu() - value_before(base, name).float().cpu()
            changes.setdefault(name, []).append(Change(term.weight, change))
    return changes, problems


def _shapes(base: nn.Module) -> dict[str, tuple[int, ...]]:
    everything = [*base_parameters(base), *persistent_buffers(unwrapped_modules(base)).items()]
    return {name: tuple(t.shape) for name, t in everything}
