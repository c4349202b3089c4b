"""A switch between held adapters at the same sites: each layer gets pointers to other parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lorary.adapters._held import Chosen, HeldAdapter, moved
from lorary.layers.adapted import Adapted, Kept, Parameters
from lorary.layers.dtensor import is_sharded
from lorary.layers.shared_projections import SharedProjections
from lorary.layers.wrappers import submodule
from lorary.model.fingerprint import Fingerprint
from lorary.model.state import AttachedState, state_of
from lorary.spec.placement import AdaptedSite


class _Parts(NamedTuple):
    """The parts of an adapted layer that belong to its adapter."""

    adapted: AdaptedSite
    params: Parameters
    shared: SharedProjections | None
    structure: Any

    @staticmethod
    def of(layer: Adapted) -> _Parts:
        return _Parts(AdaptedSite(layer.site, layer.method), layer.params, layer.shared, layer.active_structure)

    def put(self, layer: Adapted) -> None:
        adapted, delta = self.adapted, self.adapted.delta
        shapes = {role: adapted.shapes[role] for role in sorted(delta.shared)} if delta.shared else {}
        vars(layer).update(
            site=adapted.site,
            method=adapted.method,
            scale=adapted.scale,
            shared_shapes=shapes,
            active_structure=self.structure,
        )
        if layer.kept is not None:
            layer.kept = Kept()  # inside `lorary.cached`: those values are of other parameters
        if layer.shared is not self.shared:
            layer.shared = self.shared
        layer.params = self.params  # last: now the layer decides which functions compute it


def swapped(model: nn.Module, held: HeldAdapter, here: Fingerprint, chosen: Chosen, *, trainable: bool) -> bool:
    """Let the layers of the attached adapter compute another one, if that is all there is to change. All or nothing.

    Args:
        model: the model.
        held: the other adapter.
        here: the base's fingerprint.
        chosen: by which names it was chosen.
        trainable: whether its parameters require gradients.

    Returns:
        Whether it was possible. Otherwise nothing has changed.
    """
    state = state_of(model)
    if state is None or held.checked != here or not _same_places(state, held):
        return False
    found = [submodule(model, p.site.name) for p in held.sites]
    layers = [layer for layer in found if isinstance(layer, Adapted) and _is_movable(layer)]
    if len(layers) < len(found):
        return False
    before, known = [_Parts.of(layer) for layer in layers], dict(vars(state))
    drawn = held.structures if trainable else {}
    after = [_parts(held, p, layer, drawn) for p, layer in zip(held.sites, layers, strict=True)]
    try:
        _put(layers, after)
        held.require_grad(trainable)
        _follow(state, held, tuple(parts.adapted for parts in after))
        chosen.record(state)
    except BaseException:
        vars(state).update(known)
        _put(layers, before)
        raise
    return True


def _put(layers: list[Adapted], several: list[_Parts]) -> None:
    for layer, parts in zip(layers, several, strict=True):
        parts.put(layer)


def _same_places(state: AttachedState, held: HeldAdapter) -> bool:
    """Whether neither adapter changes anything but the layers at its sites, and both have the same ones."""
    changed = state.full or state.context_patch or state.replaced_weights or state.untied
    storage = held.record.method.storage
    # attached by name, because `lorary.load` may leave a base unquantised
    stored = storage.writable or (bool(state.active) and storage == state.method.storage)
    same = {p.site.name for p in state.sites} == {p.site.name for p in held.sites}
    return held.swaps and stored and same and not changed


def _is_movable(layer: Adapted) -> bool:
    return not layer.start and not any(is_sharded(p) for p in layer.params.values())


def _parts(held: HeldAdapter, adapted: AdaptedSite, layer: Adapted, drawn: Mapping[str, Any]) -> _Parts:
    site, kind = adapted.site, layer.site.kind
    if site.kind != kind:  # a linear layer may be GPT-2's transposed one here
        adapted = dataclasses.replace(adapted, site=dataclasses.replace(site, kind=kind))
    device = next(iter(layer.params.values())).device
    shared = None
    if adapted.delta.shared:
        shared = cast(SharedProjections, held.shared).to(device, torch.float32)
    return _Parts(adapted, moved(held.params[site.name], device), shared, drawn.get(site.name))


def _follow(state: AttachedState, held: HeldAdapter, sites: tuple[AdaptedSite, ...]) -> None:
    """Make the model's state that of an adapter that was just attached."""
    if state.first_forward is not None:
        state.first_forward.remove()
    state.first_forward = state.restored_from = None
    state.stepped = state.rules_ran = False
    state.method, state.sites = held.record.method, sites
