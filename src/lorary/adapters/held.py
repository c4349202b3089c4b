"""A held adapter: tensors that a model keeps under a name, and that its layers use while it is active.

Its parameters are the same objects for as long as it is held. A switch between adapters at the same sites therefore
copies nothing: each layer gets pointers to other parameters. An optimizer of one of them goes on where it was, and what
has changed them, by any route, stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter, floating
from lorary.adapters.compose.mix import stacked
from lorary.errors import Diagnostic, FileError, StateError, did_you_mean
from lorary.layers.adapted import Parameters, adapted_layers, unwrapped_modules
from lorary.layers.dtensor import full_cpu_copy
from lorary.layers.quantized_weight import stored_tensors
from lorary.layers.shared_projections import SharedProjections, leading_slice
from lorary.model.fingerprint import Fingerprint
from lorary.model.state import AttachedState, base_parameter
from lorary.spec.placement import AdaptedSite, start_name

HELD = "_lorary_held"  # the attribute of a model for the adapters that it holds


def held_by(model: nn.Module) -> dict[str, HeldAdapter]:
    """name -> held adapter, in the order in which they came; the model's own dictionary.

    Args:
        model: without wrappers around it.
    """
    if HELD not in vars(model):
        object.__setattr__(model, HELD, {})
    return cast("dict[str, HeldAdapter]", vars(model)[HELD])


class HeldAdapter:
    """An adapter that a model holds.

    Args:
        name: the name.
        adapter: its values; they are copied.
        modules: the layers of the plain model by path, on whose devices the tensors are.

    Attributes:
        record: the adapter without the tensors of its sites.
        params: site -> its parameters.
        start: site -> role -> the start that was subtracted from the base.
        shared: the tensors that all sites share, if the method has any.
        checked: the base that it was last found to fit.
    """

    def __init__(self, name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
        self.name = name
        full = {key: value.detach().to("cpu", copy=True) for key, value in adapter.full.items()}
        self.record = dataclasses.replace(adapter, tensors={}, full=full)
        self.params = parameters_of_sites(adapter, modules)
        starts = {p.site.name: [start_name(role) for role in p.starts] for p in adapter.sites}
        self.start = {
            site: {role: adapter.tensors[site][role].detach().to("cpu", copy=True) for role in roles}
            for site, roles in starts.items()
        }
        self.shared = _shared(adapter, modules)
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
        made = None if state.stepped else self.record.provenance
        self.record = dataclasses.replace(
            self.record, method=state.method, sites=state.sites, full=full, provenance=made
        )

    def take_over(self, model: nn.Module) -> None:
        """Put the held parameters in place of those of the model's layers, which have the same values."""
        for name, layer in adapted_layers(model).items():
            layer.params = moved(self.params[name], layer.weight.device)
            if layer.shared is not None:
                self.shared = layer.shared

    def require_grad(self, trains: bool) -> None:
        """Set which parameters require gradients: those that the method trains, or none."""
        for p in self.sites:
            trained = p.method.trained if trains else ()
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


def _shared(adapter: Adapter, modules: Mapping[str, nn.Module]) -> SharedProjections | None:
    sharing = [p for p in adapter.sites if p.delta.shared]
    if not sharing:
        return None
    shared = SharedProjections(adapter.sites, torch.float32, device_of(modules[sharing[0].site.name]))
    for p in sharing:
        shared.load({role: adapter.tensors[p.site.name][role] for role in p.delta.shared})
    return shared


def moved(params: Parameters, device: torch.device) -> Parameters:
    """The parameters, on this device and in 32 bits: the model may have moved while it did not use them."""
    for parameter in params.values():
        if parameter.device != device or parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(device, torch.float32)
    return params


def weighted_sum(model: nn.Module, active: Mapping[HeldAdapter, float], here: Fingerprint) -> HeldAdapter:
    """The weighted sum of held adapters, exact and without a name.

    Raises:
        MethodError: they have no sum.
    """
    modules = unwrapped_modules(model)
    for held in active:
        for site, params in held.params.items():
            if site in modules:
                moved(params, device_of(modules[site]))
    total = stacked({held.name: held.view() for held in active}, model, list(active.values()))
    made = HeldAdapter(" + ".join(held.name for held in active), total, modules)
    made.checked = here if all(held.checked == here for held in active) else None
    return made


# --- names ------------------------------------------------------------------------------------------------------------

_MOST_LETTERS = 200


class UnknownNameError(StateError, KeyError):
    """A model holds no adapter under this name."""

    __str__ = Exception.__str__  # of a KeyError, quotes and escapes


def bad_name(name: object) -> list[Diagnostic]:
    """Why a text cannot be the name of an adapter: it may become that of a folder, or of a model on a server."""
    where, fix = repr(name)[:_MOST_LETTERS], 'use a short text, such as "french" or "me/french-v2"'
    if not isinstance(name, str):
        return [Diagnostic(where, f"is a {type(name).__name__}, not a name", fix)]
    if not name or len(name) > _MOST_LETTERS or not name.isprintable() or name != name.strip():
        what = f"is not a name: it is empty, longer than {_MOST_LETTERS}, or has spaces around it or control characters"
        return [Diagnostic(where, what, fix)]
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return [Diagnostic(where, "is not a name: as that of a folder, it would lead out of the one above it", fix)]
    return []


def unknown_name(name: str, held: Iterable[str]) -> Diagnostic:
    """The error of a name under which nothing is held."""
    held = list(held)
    hint = did_you_mean(name, held) if held else 'lorary.named_adapters(model)["name"] = adapter holds one'
    return Diagnostic(repr(name)[:_MOST_LETTERS], "the model holds no adapter under this name", hint)


def weights_of_names(adapters: Any) -> list[tuple[Any, Any]] | None:
    """(name, weight) pairs, if `switch` was given names; they are not checked yet."""
    if isinstance(adapters, str):
        return [(adapters, 1.0)]
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, (list, tuple)) and adapters and all(isinstance(a, str) for a in adapters):
        return [(name, 1.0) for name in adapters]
    return None


def chosen(model: nn.Module, weights: Sequence[tuple[Any, Any]]) -> dict[HeldAdapter, float]:
    """The held adapters of these names, with their weights.

    Raises:
        FileError: a name or a weight is wrong; every reason.
    """
    held, problems = held_by(model), []
    found: dict[HeldAdapter, float] = {}
    for name, weight in weights:
        if not isinstance(name, str) or name not in held:
            missing = unknown_name(str(name), held)
            what, fix = f"{missing.what}, and a {type(name).__name__} is not an adapter", missing.fix
            problems.append(Diagnostic(repr(name)[:_MOST_LETTERS], what, f"{fix}; lorary.load_adapter(path) reads one"))
        elif held[name] in found:
            problems.append(Diagnostic(repr(name), "is named twice", "add its weights: {name: 2.0}"))
        else:
            found[held[name]] = weight
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            problems.append(Diagnostic(repr(name)[:_MOST_LETTERS], f"its weight is {weight!r}, not a finite number"))
    if not weights:
        problems.append(Diagnostic("adapters", "no name is given", "None is the base alone"))
    if problems:
        raise FileError("cannot switch adapters:", problems)
    return {one: float(weight) for one, weight in found.items()}
