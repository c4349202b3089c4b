"""Rank pruning: rank directions removed from a model's tensors and optimizer state, or from a trained adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model.state import AttachedState, state_of
from lorary.spec.interfaces import Delta, PrunableDelta
from lorary.spec.placement import AdaptedSite


def prune_directions(model: nn.Module, keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Remove all other directions (keep: site -> bool [R]) from the tensors and from the optimizer's state.

    Returns:
        False, with nothing changed, if the optimizer has a state of another shape than its parameters, or does not
        train all of them: another optimizer would go on with the old ones.
    """
    layers = {name: x for name, x in adapted_layers(model).items() if name in keep and not bool(keep[name].all())}
    old = [layer.params[role] for layer in layers.values() for role in layer.params]
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not all(id(p) in optimized for p in old if p.requires_grad):
        return False
    states = ((p, value) for p in old for value in optimizer.state.get(p, {}).values() if isinstance(value, Tensor))
    if any(value.dim() and value.shape != p.shape for p, value in states):
        return False
    new: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        kept = torch.nonzero(keep[name]).flatten()
        delta = cast(PrunableDelta, layer.method.delta)
        for role, p in list(layer.params.items()):
            dim = delta.directions[role]
            small = nn.Parameter(_select(p.detach(), kept, dim), requires_grad=p.requires_grad)
            if p in optimizer.state:
                optimizer.state[small] = {
                    key: _select(v, kept, dim) if isinstance(v, Tensor) and v.shape == p.shape else v
                    for key, v in optimizer.state.pop(p).items()
                }
            layer.params[role] = new[id(p)] = small
        _set_delta(model, layer, delta.with_directions(len(kept)))
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    return True


def directions_of(p: AdaptedSite) -> int:
    """The number of rank directions at a site; the rank itself for a delta that cannot be pruned."""
    if not isinstance(p.delta, PrunableDelta):
        return p.r
    return min(p.shapes[role][dim] for role, dim in p.delta.directions.items() if role in p.shapes)


def resize_adapters(model: nn.Module, sites: tuple[AdaptedSite, ...]) -> None:
    """Resize a model's adapters to the ranks of a saved adapter, before its values are loaded.

    Either of them may have been pruned and the other not. Layers of other methods or sites stay as they are: loading
    the values reports them.
    """
    there = {p.site.name: p for p in sites}
    for name, layer in adapted_layers(model).items():
        delta, other = layer.method.delta, there.get(name)
        if other is None or not isinstance(delta, PrunableDelta) or delta == other.delta:
            continue
        R = directions_of(other)
        if not isinstance(other.delta, PrunableDelta) or delta.with_directions(R) != other.delta.with_directions(R):
            continue
        for role, shape in other.shapes.items():
            p = layer.params[role]
            layer.params[role] = nn.Parameter(p.detach().new_zeros(shape), requires_grad=p.requires_grad)
        _set_delta(model, layer, other.delta)


def _set_delta(model: nn.Module, layer: Adapted, delta: Delta) -> None:
    """Change the delta of a layer and of its site in the model's state."""
    layer.method = layer.method.replace(delta=delta)
    state = cast(AttachedState, state_of(model))
    state.sites = tuple(
        dataclasses.replace(p, method=layer.method) if p.site.name == layer.site.name else p for p in state.sites
    )


def without_pruned_directions(
    sites: tuple[AdaptedSite, ...], tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[tuple[AdaptedSite, ...], dict[str, Mapping[str, Tensor]]]:
    """The adapter with its pruned rank directions removed."""
    if not _prunable(sites):
        return sites, {p.site.name: tensors[p.site.name] for p in sites}
    small, values = [], {}
    for p in sites:
        own = tensors[p.site.name]
        if isinstance(p.delta, PrunableDelta) and not bool((alive := _active(p, own)).all()):
            kept = torch.nonzero(alive).flatten()
            dims = p.delta.directions  # a join's tensors have none
            own = {role: _select(t, kept, dims[role]) if role in dims else t for role, t in own.items()}
            p = dataclasses.replace(p, method=p.method.replace(delta=p.delta.with_directions(len(kept))))
        small.append(p)
        values[p.site.name] = own
    return tuple(small), values


def _active(p: AdaptedSite, own: Mapping[str, Tensor]) -> Tensor:
    """[R] the directions that contribute to a site's update; of experts, to that of any of them."""
    alive = cast(PrunableDelta, p.delta).active_directions(own)
    return alive.any(0) if p.site.adapters else alive


def _prunable(sites: tuple[AdaptedSite, ...]) -> bool:
    """Whether a delta can be pruned at all. Python compares an object with a protocol slowly: one of each class."""
    return any(isinstance(delta, PrunableDelta) for delta in {type(p.delta): p.delta for p in sites}.values())


def _select(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, kept.to(tensor.device))
