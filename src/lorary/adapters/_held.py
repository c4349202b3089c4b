"""A held adapter: tensors that a model keeps under a name, and that its layers use while it is active.

Its parameters are the same objects for as long as it is held. A switch between adapters at the same sites therefore
copies nothing: each layer gets pointers to other parameters. An optimizer of one of them goes on where it was, and what
has changed them, by any route, stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter, floating
from lorary.adapters.compose.mix import stacked
from lorary.adapters.compose.plain_lora import plain_lora
from lorary.errors import MethodError
from lorary.layers.adapted import Parameters, adapted_layers, unwrapped_modules
from lorary.layers.dtensor import full_cpu_copy
from lorary.layers.quantized_weight import stored_tensors
from lorary.layers.shared_projections import SharedProjections, leading_slice
from lorary.methods.lora import LowRank
from lorary.model.fingerprint import Fingerprint
from lorary.model.state import AttachedState, base_parameter
from lorary.spec.per_expert import shapes_at
from lorary.spec.placement import AdaptedSite, start_name

HELD = "_lorary_held"  # the attribute of a model for the adapters that it holds
RANK = "_lorary_rank"  # that for the rank to which it pads what it attaches


def held_by(model: nn.Module) -> dict[str, HeldAdapter]:
    """name -> held adapter, in the order in which they came. To change it, `hold` another dictionary.

    Args:
        model: without wrappers around it.
    """
    return cast("dict[str, HeldAdapter]", vars(model).get(HELD, {}))


def hold(model: nn.Module, adapters: dict[str, HeldAdapter]) -> None:
    """Let a model hold these adapters, and no others."""
    object.__setattr__(model, HELD, adapters)


def padded_rank(model: nn.Module) -> int | None:
    """`NamedAdapters.rank` of a model without wrappers around it."""
    return vars(model).get(RANK)


class HeldAdapter:
    """An adapter that a model holds.

    Args:
        name: the name.
        adapter: its values; they are copied.
        modules: the layers of the plain model by path, on whose devices the tensors are.
        others: the adapters that the model holds already.

    Attributes:
        record: the adapter without the tensors of its sites.
        params: site -> its parameters.
        start: site -> role -> the start that was subtracted from the base.
        shared: the tensors that all sites share, if the method has any; adapters with equal ones have them in common.
        structures: site -> the structure that a rule has drawn for its next training step.
        checked: the base that it was last found to fit.
    """

    def __init__(
        self, name: str, adapter: Adapter, modules: Mapping[str, nn.Module], others: Iterable[HeldAdapter] = ()
    ) -> None:
        self.name = name
        full = {key: value.detach().to("cpu", copy=True) for key, value in adapter.full.items()}
        self.record = dataclasses.replace(adapter, tensors={}, full=full)
        self.params = parameters_of_sites(adapter, modules)
        starts = {p.site.name: [start_name(role) for role in p.starts] for p in adapter.sites}
        self.start = {
            site: {role: adapter.tensors[site][role].detach().to("cpu", copy=True) for role in roles}
            for site, roles in starts.items()
        }
        self.shared = _shared(adapter, modules, others)
        self.structures: dict[str, Any] = {}
        self.checked: Fingerprint | None = None

    @property
    def sites(self) -> tuple[AdaptedSite, ...]:
        return self.record.sites

    @property
    def swaps(self) -> bool:
        """Whether layers compute it with its parameters alone: nothing else of the base changes with it."""
        plain = not self.record.full and self.record.method.context is None
        return plain and not any(self.start.values())

    def view(self) -> Adapter:
        """The adapter with the held tensors themselves, whose values may change later."""
        return self._adapter(Tensor.detach)

    def copy(self) -> Adapter:
        """The adapter as a value, on the CPU; what sites share is copied once."""
        return self._adapter(full_cpu_copy)

    def _adapter(self, taken: Callable[[Tensor], Tensor]) -> Adapter:
        sets = {id(params): {role: taken(t) for role, t in params.items()} for params in self.params.values()}
        shared = {role: taken(t) for role, t in self.shared.tensors.items()} if self.shared is not None else {}
        tensors = {}
        for p in self.sites:
            params = self.params[p.site.name]
            own = dict(sets[id(params)])
            device = next(iter(own.values())).device if own else torch.device("cpu")
            own |= {role: leading_slice(shared[role], p.shapes[role]) for role in sorted(p.delta.shared)}
            tensors[p.site.name] = own | {role: taken(t).to(device) for role, t in self.start[p.site.name].items()}
        full = {name: taken(value) for name, value in self.record.full.items()}
        return dataclasses.replace(self.record, tensors=tensors, full=full)

    def keep(self, model: nn.Module, state: AttachedState) -> None:
        """Take over what training has made of it elsewhere than in its parameters: pruned ranks, full parameters."""
        full = {name: floating(full_cpu_copy(base_parameter(model, name))) for name in state.full}
        if state.method.rules:
            self.structures = {name: layer.active_structure for name, layer in adapted_layers(model).items()}
        before = dataclasses.replace(self.record, notes=(), provenance=None) if state.stepped else self.record
        self.record = dataclasses.replace(before, method=state.method, sites=state.sites, full=full)

    def take_over(self, model: nn.Module, *, trainable: bool) -> None:
        """Put the held parameters in place of those of the model's layers, which have the same values."""
        for name, layer in adapted_layers(model).items():
            layer.params = moved(self.params[name], layer.weight.device)
            layer.active_structure = self.structures.get(name) if trainable else None
            if layer.shared is not None:
                layer.shared = self.shared
        if self.shared is not None:
            self.shared.to(layer.weight.device, torch.float32)
        self.require_grad(trainable)

    def require_grad(self, trainable: bool) -> None:
        """Set which parameters require gradients: those that the method trains, or none."""
        for p in self.sites:
            trained = p.method.trained if trainable else ()
            for role, parameter in self.params[p.site.name].items():
                parameter.requires_grad_(role in trained)


def parameters_of_sites(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Parameters]:
    """site -> its own tensors as 32-bit parameters, copied; sites that share a set of tensors have one."""
    sets: dict[str, Parameters] = {}
    found = {}
    for p in adapter.sites:
        name = p.site.name
        if not p.share or p.share not in sets:
            device = device_of(modules[name])
            roles = [role for role in p.shapes if role not in p.delta.shared]
            own = {role: adapter.tensors[name][role].detach() for role in roles}
            own = {role: t.to(device, torch.float32, copy=True).contiguous() for role, t in own.items()}
            sets[p.share or name] = Parameters({role: nn.Parameter(t, False) for role, t in own.items()})
        found[name] = sets[p.share or name]
    return found


def device_of(layer: nn.Module) -> torch.device:
    """The device of a base layer's weight."""
    return stored_tensors(layer)[0].device


def _shared(
    adapter: Adapter, modules: Mapping[str, nn.Module], others: Iterable[HeldAdapter]
) -> SharedProjections | None:
    sharing = [p for p in adapter.sites if p.delta.shared]
    if not sharing:
        return None
    shared = SharedProjections(adapter.sites, torch.float32, device_of(modules[sharing[0].site.name]))
    for p in sharing:
        shared.load({role: adapter.tensors[p.site.name][role] for role in p.delta.shared})
    there = (other.shared for other in others if other.shared is not None)
    return next((other for other in there if _equal(other.tensors, shared.tensors)), shared)


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    same = some.keys() == others.keys()
    return same and all(
        t.shape == others[role].shape and torch.equal(t.to(others[role]), others[role]) for role, t in some.items()
    )


def moved(params: Parameters, device: torch.device) -> Parameters:
    """The parameters, on this device and in 32 bits: the model may have moved while it did not use them."""
    for parameter in params.values():
        if parameter.device != device or parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(device, torch.float32)
    return params


# --- what a switch attaches -------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The held adapters that a switch has chosen.

    Args:
        weights: of each.
        holder: the one whose own parameters are attached; None for a sum.
    """

    weights: dict[HeldAdapter, float]
    holder: HeldAdapter | None

    def record(self, state: AttachedState) -> None:
        """Write it into the model's state."""
        state.active, state.holder = self.weights, self.holder


def to_attach(
    model: nn.Module, weights: dict[HeldAdapter, float], here: Fingerprint, *, trainable: bool
) -> tuple[HeldAdapter, Chosen]:
    """The one adapter to attach for held adapters with weights: itself, their exact sum, or that sum padded.

    Raises:
        MethodError: they have no sum.
    """
    alone = next(iter(weights)) if list(weights.values()) == [1.0] else None
    rank = padded_rank(model)
    if alone is not None and (trainable or rank is None):
        return alone, Chosen(weights, alone)
    modules = unwrapped_modules(model)
    try:
        total = _sum(model, weights, modules)
    except MethodError:
        if alone is None:
            raise
        return alone, Chosen(weights, alone)
    plain = not total.full and total.method.context is None
    if rank is not None and plain and all(p.r <= rank for p in total.sites):
        total = _padded(total, [p for held in held_by(model).values() for p in held.sites], rank)
    elif alone is not None:
        return alone, Chosen(weights, alone)
    made = HeldAdapter(" + ".join(held.name for held in weights), total, modules)
    made.checked = here if all(held.checked == here for held in weights) else None
    return made, Chosen(weights, None)


def _sum(model: nn.Module, weights: Mapping[HeldAdapter, float], modules: Mapping[str, nn.Module]) -> Adapter:
    """The weighted sum of held adapters, exact by stacking their factors."""
    for held in weights:
        for site, params in held.params.items():
            if site in modules:
                moved(params, device_of(modules[site]))
    return stacked({held.name: held.view() for held in weights}, model, list(weights.values()))


def _padded(total: Adapter, places: Sequence[AdaptedSite], rank: int) -> Adapter:
    """The same LoRA at all of these places and of this rank: the rest of its factors is zero."""
    places = list({p.site.name: p for p in [*places, *total.sites]}.values())
    sites = [AdaptedSite(p.site.whole, p.method) for p in places]
    factors = {}
    for p in sites:
        name, shapes = p.site.name, shapes_at(LowRank(rank), p.site)
        padded = {role: torch.zeros(shape) for role, shape in shapes.items()}
        for role, t in total.tensors.get(name, {}).items():
            leading_slice(padded[role], tuple(t.shape)).copy_(t)
        factors[name] = padded["B"], padded["A"]
    method, adapted, tensors = plain_lora(sites, factors, storage=total.method.storage)
    return dataclasses.replace(total, method=method, sites=adapted, tensors=tensors)
