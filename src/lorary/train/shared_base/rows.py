"""The layers of a base that computes the rows of several adapters: each adapter's layer on the rows of its own batch.

The rows of a batch stand together along the first dimension of every layer's input, adapter by adapter. An adapter
whose layer is the base's output plus a product of two factors shares the base's pass over these rows, and the products
are one node of the graph (`lorary.kernels.segments`). Of any other method the adapter's own layer computes its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, TrainingError
from lorary.kernels.segments import Segment, add_segments
from lorary.kernels.torch_internals import storage_id
from lorary.layers.adapted import Adapted
from lorary.layers.quantized_weight import stored_tensors
from lorary.methods.lora import Add
from lorary.spec.interfaces import is_fused

HEADLINE = "cannot train these adapters together:"
ALONE = "train this adapter by itself"


@dataclass
class Rows:
    """The rows of the running forward pass.

    Args:
        counts: adapter -> its rows, in the order in which they stand; empty: the base's own function.
    """

    counts: Mapping[str, int]

    def sizes(self, path: str, first: int) -> list[int]:
        """The extent of every adapter's rows along the first dimension of a layer's input.

        Args:
            path: of the layer.
            first: the size of that dimension; a multiple of all rows if it has been flattened with others.

        Raises:
            TrainingError: it cannot be divided among the adapters.
        """
        total = sum(self.counts.values())
        each, rest = divmod(first, total)
        if rest or not each:
            what = f"gets an input of {first:,} rows, which are not those of {total:,} rows of the batch"
            raise TrainingError(HEADLINE, [Diagnostic(path, what, "exclude it, or train the adapters one by one")])
        return [count * each for count in self.counts.values()]


@dataclass(frozen=True)
class _Group:
    """Adapters whose rows a layer computes at once.

    Args:
        names: of the adapters, whose rows follow each other.
        layers: their adapted layers, whose factors are added to the base's output; empty: nothing is added.
        own: the layer of a single adapter that computes its rows by itself.
    """

    names: tuple[str, ...]
    layers: tuple[Adapted, ...] = ()
    own: nn.Module | None = None


class RowsForward:
    """The forward of a layer of the base, with every adapter's layer on its rows.

    Args:
        path: of the layer.
        base: the layer.
        layers: adapter -> its layer at this path, on the base's weight or on one of its own.
        rows: of the running forward pass.
    """

    def __init__(self, path: str, base: nn.Module, layers: Mapping[str, nn.Module], rows: Rows) -> None:
        self.path, self.layers, self.rows = path, dict(layers), rows
        self.plain: Callable[..., Any] = base.forward
        self.together = {name for name, layer in layers.items() if adds_factors(layer) and _on_weight_of(layer, base)}
        self._groups: tuple[tuple[str, ...], list[_Group]] = ((), [])

    def leave(self, name: str) -> None:
        """Forget the layer of an adapter that has ended."""
        self.layers.pop(name, None)
        self._groups = ((), [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of all rows.

        Raises:
            TrainingError: the layer's input is not one tensor, or has other rows than the batch.
        """
        if not self.rows.counts:
            return self.plain(*args, **kwargs)
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            what = f"gets {len(given)} arguments, not one tensor, so that its rows are not known"
            raise TrainingError(HEADLINE, [Diagnostic(self.path, what, ALONE)])
        x, names = given[0], tuple(self.rows.counts)
        sizes = dict(zip(names, self.rows.sizes(self.path, len(x)), strict=True))
        if self._groups[0] != names:
            self._groups = names, self._grouped(names)
        groups = self._groups[1]
        if len(groups) == 1:
            return self._compute(groups[0], x, sizes)
        parts = x.split([sum(sizes[name] for name in group.names) for group in groups])
        return torch.cat([self._compute(group, part, sizes) for group, part in zip(groups, parts, strict=True)])

    def _compute(self, group: _Group, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        if group.own is not None:
            own: Tensor = group.own(x)
            return own
        y: Tensor = self.plain(x)
        if not group.layers:
            return y
        segments = []
        for name, layer in zip(group.names, group.layers, strict=True):
            B, A = layer.factors()
            segments.append(Segment(sizes[name], A, B, layer.scale))
        return add_segments(y, x, segments)

    def _grouped(self, names: Sequence[str]) -> list[_Group]:
        """The groups of adapters, in the order of their rows."""
        return [self._group(own, tuple(members)) for (_, own), members in groupby(names, self._way)]

    def _way(self, name: str) -> tuple[str, str | None]:
        """How the rows of an adapter are computed; and its name, if by itself."""
        if name not in self.layers:
            return "base", None
        return ("factors", None) if name in self.together else ("own", name)

    def _group(self, own: str | None, names: tuple[str, ...]) -> _Group:
        if own is not None:
            return _Group(names, own=self.layers[own])
        return _Group(names, tuple(layer for name in names if isinstance(layer := self.layers.get(name), Adapted)))


def adds_factors(layer: nn.Module) -> bool:
    """Whether a layer computes W x + b + s B A x by the two factors, and has no faster way of its own."""
    if not isinstance(layer, Adapted) or type(layer.join) is not Add or not layer.kind.rowwise:
        return False
    return layer.delta.arbitrary_factors or not is_fused(type(layer.delta))


def _on_weight_of(layer: nn.Module, base: nn.Module) -> bool:
    """Whether a layer's weight and bias are those of the base, in the same memory."""

    def memory(module: nn.Module) -> list[int]:
        bias = getattr(module, "bias", None)
        return [storage_id(t) for t in (*stored_tensors(module), *([] if bias is None else [bias]))]

    return isinstance(layer, Adapted) and memory(layer.base) == memory(base)
