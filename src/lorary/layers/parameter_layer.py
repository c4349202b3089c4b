"""The base class of layers that are only a parameter of a plain model's module, and no module of it."""

from __future__ import annotations

from torch import nn


class ParameterLayer(nn.Module):
    """A parameter of a module that computes with several matrices, seen as a layer of its own.

    The plain model keeps its parameter; while the matrix is adapted or quantised, a module is in its place, under the
    parameter's name.

    Attributes:
        order: the names of the owner's parameters as they were registered.
    """

    order: tuple[str, ...]
