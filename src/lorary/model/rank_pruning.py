"""Shrinking: directions that a rule has given up leave the tensors and the optimizer's state; or an adapter, later."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model.state import AttachedState, state_of
from lorary.spec.interfaces import Delta, Tensors
from lorary.spec.placement import AdaptedSite


@runtime_checkable
class Shrinkable(Protocol):
    """A delta that is a sum of directions, each of which can be taken out.

    Attributes:
        directions: role -> the dimension of its tensor along which the directions lie.
    """

    directions: Mapping[str, int]

    def left(self, R: int) -> Delta:
        """The same with R directions left."""
        ...

    def alive(self, p: Tensors) -> Tensor:
        """[R] of which directions the update consists."""
        ...


def shrink(model: nn.Module, keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> bool:
    """Keep these directions alone (site -> bool [R]), in the tensors and in the optimizer's state.

    Returns:
        False, and nothing is touched, where the optimizer keeps a state of another shape than its parameters, or
        does not train all of them: whoever does would go on with the old ones.
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if not bool(keep[name].all())}
    old = [layer.params[role] for layer in layers.values() for role in layer.params]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not all(id(p) in held for p in old if p.requires_grad):
        return False
    if not all(_sliceable(p, value) for p in old for value in optimizer.state.get(p, {}).values()):
        return False
    new: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        where = torch.nonzero(keep[name]).flatten()
        for role, p in list(layer.params.items()):
            dim = cast(Shrinkable, layer.method.delta).directions[role]
            small = nn.Parameter(_taken(p.detach(), where, dim), requires_grad=p.requires_grad)
            if p in optimizer.state:
                state = optimizer.state.pop(p)
                optimizer.state[small] = {k: _taken(v, where, dim) if _alike(p, v) else v for k, v in state.items()}
            layer.params[role] = new[id(p)] = small
        _say(model, layer, _left(layer.method, len(where)))
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    return True


def directions_of(p: AdaptedSite) -> int:
    """How many directions the update has at a site: the rank, where none can be taken out."""
    if not isinstance(p.delta, Shrinkable):
        return p.r
    return min(p.shapes[role][dim] for role, dim in p.delta.directions.items() if role in p.shapes)


def fit(model: nn.Module, placed: tuple[AdaptedSite, ...]) -> None:
    """Give a model's layers the sizes that they have in an adapter, before its values are put in.

    It has been shrunk, and they have not been yet; or they have been, and it is from before.

    Layers of other methods, or of other sites, stay as they are: whoever puts the values in says what differs.
    """
    there = {p.site.name: p for p in placed}
    for name, layer in adapted_layers(model).items():
        delta, other = layer.method.delta, there.get(name)
        if other is None or not isinstance(delta, Shrinkable) or delta == other.delta:
            continue
        R = directions_of(other)
        if not isinstance(other.delta, Shrinkable) or delta.left(R) != other.delta.left(R):
            continue
        for role, shape in other.shapes.items():
            p = layer.params[role]
            layer.params[role] = nn.Parameter(p.detach().new_zeros(shape), requires_grad=p.requires_grad)
        _say(model, layer, layer.method.replace(delta=other.delta))


def _say(model: nn.Module, layer: Adapted, method: Any) -> None:
    """Note in the layer and in what the model remembers how many directions are left."""
    layer.method = method
    state = cast(AttachedState, state_of(model))
    state.sites = tuple(
        dataclasses.replace(p, method=layer.method) if p.site.name == layer.site.name else p for p in state.sites
    )


def _left(method: Any, R: int) -> Any:
    return method.replace(delta=cast(Shrinkable, method.delta).left(R))


def compact(
    placed: tuple[AdaptedSite, ...], tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[tuple[AdaptedSite, ...], dict[str, Mapping[str, Tensor]]]:
    """The same adapter without the directions of which its update does not consist."""
    small, values = [], {}
    for p in placed:
        own = tensors[p.site.name]
        if isinstance(p.delta, Shrinkable) and not bool((alive := p.delta.alive(own)).all()):
            where = torch.nonzero(alive).flatten()
            along = p.delta.directions  # a join's tensors have none
            own = {role: _taken(t, where, along[role]) if role in along else t for role, t in own.items()}
            p = dataclasses.replace(p, method=_left(p.method, len(where)))
        small.append(p)
        values[p.site.name] = own
    return tuple(small), values


def _taken(tensor: Tensor, where: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, where.to(tensor.device))


def _alike(p: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape


def _sliceable(p: Tensor, value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0 or value.shape == p.shape
