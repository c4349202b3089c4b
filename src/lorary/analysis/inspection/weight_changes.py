"""The weights that a trained adapter changes, before and after, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.low_rank_form import BaseLayer, factors_on_base, form_without_base
from lorary.adapters.tensor_checks import adapter_problems
from lorary.errors import Diagnostic
from lorary.layers.adapted import Adapted, unwrapped_modules
from lorary.layers.kinds import KINDS, as_matrix, kind_of, site
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.wrappers import submodule
from lorary.model.checks import layer_mismatches
from lorary.model.state import state_of, value_before
from lorary.spec.interfaces import Factors
from lorary.spec.join import not_mergeable
from lorary.spec.per_expert import expert_name
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import PARAMETERS


class WeightChange(NamedTuple):
    """One weight in 32 bits on the CPU; of fused experts all of them, with a leading E.

    Args:
        name: of its layer.
        factors: (B [out, R], A [R, in]) if the change is B A alone.
        before: W [out, in]; None without the base.
        after: W' [out, in]; None without the base.
    """

    name: str
    factors: Factors | None
    before: Tensor | None = None
    after: Tensor | None = None

    def matrices(self) -> list[WeightChange]:
        """The change of each expert; of another weight itself."""
        stacked = self.before if self.factors is None else self.factors[0]
        if stacked is None or stacked.dim() == 2:
            return [self]
        B, A = self.factors or (None, None)
        parts = (B, A, self.before, self.after)
        each = ([None if part is None else part[e] for part in parts] for e in range(len(stacked)))
        return [
            WeightChange(expert_name(self.name, e), None if B is None or A is None else (B, A), before, after)
            for e, (B, A, before, after) in enumerate(each)
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.factors is not None:
            return self.factors[0].shape[0], self.factors[1].shape[1]
        out, inp = cast(Tensor, self.before).shape
        return out, inp

    @property
    def delta(self) -> Tensor:
        """W' - W [out, in]; from the factors if it has them, so that nothing is cancelled."""
        if self.factors is not None:
            return self.factors[0] @ self.factors[1]
        return cast(Tensor, self.after) - cast(Tensor, self.before)


def weight_changes(adapter: Adapter, base: nn.Module | None) -> Iterator[WeightChange]:
    """The adapted weights in the order of the sites, then those that trained in full, if the base is given.

    Raises:
        MethodError: the base lacks a layer, or its weight has another shape.
    """
    modules = {} if base is None else unwrapped_modules(base)
    for adapted in adapter.sites:
        yield _of_site(adapter, adapted, base, modules)
    for name, parameter in full_matrices(adapter, base).items():
        assert base is not None
        layer = modules[name]
        before, after = (_matrix(layer, t) for t in (value_before(base, parameter), adapter.full[parameter]))
        yield WeightChange(name, None, before, after)


def change_problems(adapter: Adapter, base: nn.Module | None) -> list[Diagnostic]:
    """Why the changes cannot be computed: the adapter's tensors, or a layer of the base that is missing or differs."""
    if problems := adapter_problems(adapter) or not_mergeable((a.site.name, a.join) for a in adapter.sites):
        return problems
    modules = {} if base is None else unwrapped_modules(base)
    for adapted in adapter.sites:
        name = adapted.site.name
        if base is not None:
            problems += layer_mismatches(adapted.site, modules.get(name))
        elif _plain_factors(adapted, adapter.tensors[name]) is None:
            what = f"{type(adapted.join).__name__} changes its weight by an amount that depends on the weight"
            problems.append(Diagnostic(name, what, "give the base"))
    if base is not None:
        problems += _state_problems(base)
        for name, parameter in full_matrices(adapter, base).items():
            found, expected = tuple(value_before(base, parameter).shape), adapter.full[parameter].shape
            if found != tuple(expected):
                problems.append(Diagnostic(name, f"its weight is {found}, the adapter's {tuple(expected)}"))
    if not problems and not adapter.sites and not full_matrices(adapter, base):
        fix = "" if base is not None or not adapter.full else "give the base: it trained parameters in full"
        problems.append(Diagnostic("adapter", "changes no weight matrix", fix))
    return problems


def tuned_problems(adapter: Adapter, base: nn.Module | None, tuned: nn.Module | None) -> list[Diagnostic]:
    """The differences between the layers of a tuned model and the adapter's."""
    if base is None or tuned is None:
        return []
    layers, modules = unwrapped_modules(tuned), unwrapped_modules(base)
    sites = [s.site for s in adapter.sites]
    sites += [site(name, modules[name]) for name in full_matrices(adapter, base)]
    found = [problem for one in sites for problem in layer_mismatches(one, layers.get(one.name))]
    return [Diagnostic(f"the tuned model's {p.where}", p.what, p.fix) for p in found]


def _state_problems(base: nn.Module) -> list[Diagnostic]:
    state = state_of(base)
    if state is None or state.merged is None:
        return []
    return [Diagnostic("base", "has an adapter merged into its weights", "unmerge it first")]


def full_matrices(adapter: Adapter, base: nn.Module | None) -> dict[str, str]:
    """layer -> its weight's name, of layers without an adapter whose whole weight was trained; {} without a base."""
    if base is None:
        return {}
    adapted, kinds = {s.site.name for s in adapter.sites}, {n: kind_of(m) for n, m in unwrapped_modules(base).items()}
    layers = {n if kind in PARAMETERS else f"{n}.weight": n for n, kind in kinds.items() if kind and n not in adapted}
    return {layers[name]: name for name in adapter.full if name in layers}


def tuned_matrix(model: nn.Module, name: str) -> Tensor:
    """The weight [out, in], or [E, out, in], of a tuned model's layer in 32 bits, with what is attached to it."""
    layer = submodule(model, name)
    if isinstance(layer, Adapted):
        return layer.merged()[0].float().cpu()
    return KINDS[cast(str, kind_of(layer))].matrix(layer).detach().float().cpu()


def _of_site(
    adapter: Adapter, adapted: AdaptedSite, base: nn.Module | None, modules: Mapping[str, nn.Module]
) -> WeightChange:
    name, tensors = adapted.site.name, adapter.tensors[adapted.site.name]
    factors, own = _plain_factors(adapted, tensors), adapter.full.get(f"{name}.weight")
    if base is None:
        return WeightChange(name, factors)
    before = _base_matrix(base, adapted, modules[name])
    if factors is not None and own is None:
        return WeightChange(name, factors, before, before + factors[0] @ factors[1])
    start = before if own is None else _matrix(modules[name], own)
    bias = getattr(modules[name], "bias", None)
    b = None if bias is None else bias.detach().float().cpu()
    values = {role: t.float() for role, t in tensors.items()}
    after, _ = adapted.merged(values, start, b, factors_on_base(adapted, tensors))
    return WeightChange(name, None, before, after)


def _base_matrix(base: nn.Module, adapted: AdaptedSite, layer: nn.Module) -> Tensor:
    """W [out, in] of the unmodified base."""
    name = adapted.site.name
    state = state_of(base)
    if state is not None and (saved := state.full.get(f"{name}.weight")) is not None and not is_quantized(layer):
        return _matrix(layer, saved)
    return BaseLayer(base, adapted, layer).weight()


def _plain_factors(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> Factors | None:
    """(B, A) with W' = W + B A; None for a change that is not a product, or depends on W."""
    form = form_without_base(adapted, tensors)
    return None if form is None or form.gain is not None else (form.B, form.A)


def _matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight in its layer's own layout as [out, in], in 32 bits on the CPU."""
    return as_matrix(layer, weight.detach()).to("cpu", torch.float32)
