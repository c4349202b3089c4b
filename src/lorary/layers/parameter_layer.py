"""The base class of layers that are only a parameter of a plain model's module, and no module of it."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import nn

from lorary.kernels.torch_internals import children_of, parameters_of


class ParameterLayer(nn.Module):
    """A parameter of a module that computes with several matrices, seen as a layer of its own.

    The plain model keeps its parameter; while the matrix is adapted or quantised, a module is in its place, under the
    parameter's name.

    Attributes:
        is_plain: whether the layer stands for the owner's parameter itself.
        order: the names of the owner's parameters as they were registered.
    """

    weight: nn.Parameter
    is_plain = False
    order: tuple[str, ...]


def place(owner: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of a parameter of its owner, or the parameter of a plain one back."""
    parameters, children = parameters_of(owner), children_of(owner)
    if isinstance(layer, ParameterLayer) and layer.is_plain:
        children.pop(name, None)
        parameters[name] = layer.weight
        reorder(parameters, layer.order)
    else:
        parameters.pop(name, None)
        children[name] = layer
        layer.train(owner.training)


def reorder(found: MutableMapping[str, Any], names: Iterable[str]) -> None:
    """Move these keys, those that are there, to the end of a dictionary, in this order."""
    for key in [key for key in names if key in found]:
        found[key] = found.pop(key)
