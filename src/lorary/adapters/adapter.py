"""Adapter: a trained adapter as a value. What files hold, what mixing maps over, what serving loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorary._deprecated import RenamedAttribute, forwarding
from lorary.adapters.low_rank_form import LowRankForm, low_rank_forms
from lorary.errors import Diagnostic, MethodError
from lorary.layers.adapted import Adapted, adapted_layers, leading_slice
from lorary.layers.dtensor import full_cpu_copy
from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.model.fingerprint import Fingerprint
from lorary.model.rank_pruning import compact
from lorary.model.state import base_parameter, require, state_of
from lorary.spec.interfaces import Storage, Unquantized
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite


@dataclass(frozen=True)
class Adapter:
    """A trained adapter as a value: method, tensors, and the fingerprint of its base.

    Args:
        method: the method, at the rank that sites without one of their own take.
        sites: the adapted sites, each with the method there.
        tensors: site -> role -> tensor.
        full: base parameter -> its trained value.
        base: the fingerprint of the base that it was trained on.
        notes: what the reader of its file found worth knowing.
    """

    method: Method
    sites: tuple[AdaptedSite, ...] = field(repr=False)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    full: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    base: Fingerprint = field(default_factory=Fingerprint)
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module) -> Adapter:
        """A copy of what is attached to a model.

        Raises:
            StateError: nothing is.
        """
        state = require(model, "take from the model")
        tensors = _taken(adapted_layers(model))
        full = {name: full_cpu_copy(base_parameter(model, name)) for name in state.full}
        return Adapter(state.method, state.sites, tensors, full, Fingerprint.of(model))

    load = staticmethod(forwarding("Adapter.load", "load_adapter"))
    save = forwarding("Adapter.save", "save_adapter")
    placed = RenamedAttribute("sites")

    def low_rank(self, base: nn.Module | None = None) -> dict[str, LowRankForm]:
        """site -> (B, A, gain, shift) on the unmodified base, in fp32: how everything downstream sees any method.

        What the base gave up at the start (PiSSA, OLoRA) is subtracted: such an adapter has twice its rank here.

        Args:
            base: the base, for the methods whose gain or shift depends on its weights (DoRA, GLoRA).

        Raises:
            MethodError: a method has no such form, or none without the base; the base lacks a layer. Each reason once.
        """
        return low_rank_forms(self.sites, self.tensors, base)

    def compact(self) -> Adapter:
        """The same function without the directions that do nothing (AdaLoRA's masked ones)."""
        placed, tensors = compact(self.sites, self.tensors)
        return dataclasses.replace(self, sites=placed, tensors=tensors)

    @property
    def size(self) -> int:
        """Bytes of all its tensors; what sites share counts once."""
        every = [t for roles in self.tensors.values() for t in roles.values()] + list(self.full.values())
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in every}.values())


def _taken(layers: Mapping[str, Adapted]) -> dict[str, dict[str, Tensor]]:
    """site -> role -> a copy of everything that belongs to the adapter; what is shared is copied once."""
    bank: dict[str, Tensor] = {}
    own: dict[int, dict[str, Tensor]] = {}  # layers may train one set of tensors in common
    for layer in layers.values():
        if not bank and layer.shared is not None:
            bank = {role: full_cpu_copy(t) for role, t in layer.shared.tensors.items()}
        if id(layer.params) not in own:
            own[id(layer.params)] = {role: full_cpu_copy(t) for role, t in layer.params.items()}
    return {
        name: own[id(layer.params)]
        | {role: leading_slice(bank[role], shape) for role, shape in layer.shared_shapes.items()}
        | {role: t.clone() for role, t in layer.start.items()}
        for name, layer in layers.items()
    }


def stacked(adapters: Sequence[Adapter], model: nn.Module, weights: Sequence[float] | None = None) -> Adapter:
    """The weighted sum of adapters' updates as one adapter: exact, by stacking their factors along the rank.

    Args:
        adapters: any methods whose update is B A and nothing more.
        model: the base, for the values of parameters that some of them trained in full.
        weights: one for each; 1 where silent. Where all were trained on a base packed in one way, so is the sum's.

    Raises:
        MethodError: one of them is no plain sum (gains, shifts).
    """
    weights = weights or [1.0] * len(adapters)
    storage = adapters[0].method.storage if len({a.method.storage for a in adapters}) == 1 else Unquantized()
    contexts = {a.method.context for a in adapters}
    factors: dict[str, list[LowRankForm]] = {}
    sites: dict[str, AdaptedSite] = {}
    problems: dict[str, Diagnostic] = {}
    if len(contexts) > 1:
        what = "they read in different ways: " + "; ".join(sorted(str(c or "as the base does") for c in contexts))
        problems["context"] = Diagnostic("context", what)
    for adapter, w in zip(adapters, weights, strict=True):
        for p in adapter.sites:
            sites.setdefault(p.site.name, p)
        for name, form in adapter.low_rank(model).items():
            if form.gain is not None or form.shift is not None:
                problems[name] = Diagnostic(name, "one of them gives its output a gain or a shift of its own")
            factors.setdefault(name, []).append(LowRankForm(w * form.B, form.A))
    if problems:
        raise MethodError("cannot add these adapters:", problems.values())
    full = _summed_full(adapters, weights, model)
    placed, tensors = [], {}
    for name, forms in factors.items():
        B, A = torch.cat([f.B for f in forms], 1), torch.cat([f.A for f in forms], 0)
        site = dataclasses.replace(sites[name].site, parts=())  # the parts are in B's zeros now
        placed.append(AdaptedSite(site, _plain(A.shape[0], storage)))
        tensors[name] = {"A": A, "B": B}
    method = _plain(max(p.r for p in placed), storage) if placed else Method(full=tuple(full))
    context = contexts.pop()
    placed = [dataclasses.replace(p, method=p.method.replace(context=context)) for p in placed]
    method = method.replace(context=context)
    return Adapter(method, tuple(placed), tensors, full, adapters[0].base)


def _plain(r: int, storage: Storage) -> Method:
    """LoRA of rank r whose scale is in B already."""
    return Method(LowRank(r), Kaiming(), ConstantScale(1.0), Add(), storage=storage)


def _summed_full(adapters: Sequence[Adapter], weights: Sequence[float], model: nn.Module) -> dict[str, Tensor]:
    """Fully trained parameters: the base's value and the weighted changes that the adapters made to it."""
    state = state_of(model)
    total: dict[str, Tensor] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, value in adapter.full.items():
            kept = state.full.get(name) if state is not None else None
            before = (kept if kept is not None else base_parameter(model, name).detach()).float().cpu()
            total[name] = total.get(name, before) + w * (value.float() - before)
    return {name: value.to(base_parameter(model, name).dtype) for name, value in total.items()}
