"""Triton kernels for the terms of many adapters, each on its own rows, with its own rank.

    shrink   h = A x        in parts of the input, so that a few rows fill a GPU; at once for layers with the same input
    expand   y = gain * y + w * (b * (B (d * h)) + shift)        in place; sums the parts of h

Rows are cut into items of at most ROWS rows of one adapter. Grids are as large as the items' capacity, and an item
without rows ends at once: a CUDA graph that was captured with `Items` computes whatever they are filled with later.
Adapters' tensors are found by the addresses in the table, in 64 bits. Sums are in float32, in an order that does not
depend on other items, without atomics.

Importing this needs Triton. Without a GPU, `TRITON_INTERPRET=1` runs the kernels on the CPU: a check, not a use.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorary.kernels.torch_internals import version_of
from lorary.kernels.triton_rounding import rounded
from lorary.serve.batch.ops.table import FIELDS, MOST_RANK

ROWS = 16  # of an item: the smallest tile of the tensor cores
RANKS = 16  # ranks of a tile
_PROGRAMS = 256  # of a launch at least, as far as parts of the input allow
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# (inputs at least, inputs of a tile, parts at most); a search for the fastest would slow down the first request
_SHRINK_TILES = ((4096, 128, 8), (1024, 128, 4), (0, 64, 2))
_EXPAND_TILE = 128  # outputs of a tile

Piece = tuple[int, int, int, float]  # slot, start, stop, weight


class Launcher:
    """Computes the short segments of layers on a GPU.

    Layers that got the same input once, such as q, k and v, share one launch of `shrink` from then on.

    Args:
        capacity: items at least of each step: for CUDA graphs, as many as there are rows.
    """

    types = TYPES

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self._items: dict[tuple[int, torch.device], Items] = {}
        self._siblings: dict[int, list[int]] = {}  # the first layer with an input -> all of them
        self._chosen: dict[tuple[int, ...], Tensor] = {}
        self._last: _Shrunk | None = None

    def short(self, width: int) -> int:
        return 256  # longer segments fill the GPU in plain matrix products

    def prepare(self, pieces: Sequence[Piece], rows: int, device: torch.device) -> Items:
        """The items of the pieces (slot, start, stop, weight), in the buffers for so many rows."""
        needed = sum(1 for _ in _items(pieces))
        items = self._items.get((rows, device))
        if items is None or items.capacity < needed:
            items = Items(max(self.capacity, triton.next_power_of_2(needed)), device)
            self._items[rows, device] = items
        items.fill(pieces)
        self._last = None
        return items

    def add_rows(self, table: Tensor, layer: int, items: Items, x: Tensor, y: Tensor) -> None:
        """Add the terms of one layer to y [rows, out], in place."""
        last = self._last
        if last is None or not last.is_of(x, items):
            group = self._siblings.setdefault(layer, [layer])
            h = self._shrunk(table, group, items, x)
            last = self._last = _Shrunk(x, _version(x), items, layer, tuple(group), h)
        if layer in last.layers:
            h = last.h[last.layers.index(layer)]
        else:
            self._siblings[last.leader].append(layer)
            h = self._shrunk(table, [layer], items, x)[0]
        expand(table, layer, items, h, y)

    def _shrunk(self, table: Tensor, layers: Sequence[int], items: Items, x: Tensor) -> Tensor:
        key = tuple(layers)
        if key not in self._chosen:
            self._chosen[key] = torch.tensor(key, dtype=torch.int32, device=x.device)
        return shrink(table, self._chosen[key], items, x)


class _Shrunk(NamedTuple):
    """The last product with A: of which input, and for which layers. The input's memory is not used again meanwhile."""

    x: Tensor
    version: int | None
    items: Items
    leader: int
    layers: tuple[int, ...]
    h: Tensor

    def is_of(self, x: Tensor, items: Items) -> bool:
        """Whether it is of this input, unchanged: of inference tensors, which have no version, that is not known."""
        mine = self.x
        same = (mine.data_ptr(), mine.shape, mine.stride()) == (x.data_ptr(), x.shape, x.stride())
        return same and items is self.items and self.version is not None and self.version == _version(x)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else version_of(x)


class Items:
    """The items of a step, in buffers that are filled again for each.

    Args:
        capacity: items at most.
        device: of the buffers.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        pinned = device.type == "cuda"
        self._here = torch.zeros(5, capacity, dtype=torch.int32, pin_memory=pinned)
        self._there = torch.zeros(5, capacity, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if pinned else None
        self.starts, self.lengths, self.slots, self.counts = self._there[:4]
        self.weights = self._there[4].view(torch.float32)

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Take the pieces (slot, start, stop, weight) of a step; those of a weighted sum follow each other.

        Raises:
            ValueError: they are more than the capacity.
        """
        found = list(_items(pieces))
        if len(found) > self.capacity:
            raise ValueError(f"{len(found)} items, and the capacity is {self.capacity}")
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copy, which ended long ago as a rule
        self._here.zero_()
        if found:
            starts, lengths, slots, counts, weights = zip(*found, strict=True)
            self._here[:4, : len(found)] = torch.tensor([starts, lengths, slots, counts], dtype=torch.int32)
            self._here[4, : len(found)] = torch.tensor(weights, dtype=torch.float32).view(torch.int32)
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _items(pieces: Sequence[Piece]) -> Iterator[tuple[int, int, int, int, float]]:
    """(start, length, slot, items with the same rows from here on or 0, weight): a sum's items lie side by side."""
    first = 0
    while first < len(pieces):
        start, stop = pieces[first][1:3]
        same = [p for p in pieces[first:] if p[1:3] == (start, stop)]
        for row in range(start, stop, ROWS):
            for number, (slot, _, _, weight) in enumerate(same):
                yield row, min(ROWS, stop - row), slot, 0 if number else len(same), weight
        first += len(same)


def shrink(table: Tensor, layers: Tensor, items: Items, x: Tensor) -> Tensor:
    """The parts of h for each of some layers with the same input.

    Args:
        table: [slots, layers, FIELDS] of an `AdapterTable`.
        layers: [n] int32 the indices of the layers.
        items: the rows and slots.
        x: [rows, in] of a dtype in `TYPES` that the adapters' tensors have, too.

    Returns:
        [n, parts, capacity, ROWS, MOST_RANK] in float32; only what `expand` reads is written.
    """
    inp = x.shape[1]
    tile, most = next((tile, parts) for least, tile, parts in _SHRINK_TILES if inp >= least)
    parts = max(1, min(most, _PROGRAMS // max(1, items.capacity)))
    h = torch.empty(len(layers), parts, items.capacity, ROWS, MOST_RANK, device=x.device)
    if items.capacity == 0:
        return h
    place = (table, table.shape[1], layers, items.starts, items.lengths, items.slots)
    constants = {"FIELDS": FIELDS, "MOST": MOST_RANK, "ROWS": ROWS, "RANKS": RANKS, "TILE": tile, "PARTS": parts}
    with _on(x):
        grid = (items.capacity, parts, len(layers))
        _shrink[grid](*place, x, h, inp, x.stride(0), items.capacity, INTERPRETED=not x.is_cuda, **constants)
    return h


def expand(table: Tensor, layer: int, items: Items, h: Tensor, y: Tensor) -> None:
    """Add the terms of one layer to y [rows, out], in place.

    Args:
        table: [slots, layers, FIELDS] of an `AdapterTable`.
        layer: the index of the layer.
        items: the rows and slots.
        h: [parts, capacity, ROWS, MOST_RANK] of `shrink`.
        y: [rows, out] of the dtype of x.
    """
    out = y.shape[1]
    place = (table, table.shape[1], layer, items.starts, items.lengths, items.slots, items.counts, items.weights)
    constants = {"FIELDS": FIELDS, "MOST": MOST_RANK, "ROWS": ROWS, "RANKS": RANKS}
    if items.capacity == 0:
        return
    with _on(y):
        grid = (items.capacity, -(-out // _EXPAND_TILE))
        more = {"TILE": _EXPAND_TILE, "PARTS": len(h), "INTERPRETED": not y.is_cuda}
        _expand[grid](*place, h, y, out, y.stride(0), items.capacity, **constants, **more)


def _on(tensor: Tensor) -> Any:
    """A context that launches kernels on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # it would multiply the bits of 16-bit numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _shrink(
    table, layers, chosen, starts, lengths, slots, x, h, inp, x_row, capacity,
    FIELDS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One item, one part of the inputs, one layer."""
    item, part, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + item)
    if length == 0:
        return
    kind = x.dtype.element_ty
    entry = table + (tl.load(slots + item).to(tl.int64) * layers + tl.load(chosen + member)) * FIELDS
    rank = tl.load(entry + 6).to(tl.int32)
    A, A_row = tl.load(entry).to(tl.pointer_type(kind)), tl.load(entry + 7)
    row = tl.arange(0, ROWS)
    x_rows = x + (tl.load(starts + item) + row).to(tl.int64)[:, None] * x_row
    h_rows = h + (((member * PARTS + part).to(tl.int64) * capacity + item) * ROWS + row)[:, None] * MOST
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for begin in range(part * TILE, inp, PARTS * TILE):
            column = begin + tl.arange(0, TILE)
            xs = tl.load(x_rows + column[None, :], mask=(row < length)[:, None] & (column < inp)[None, :], other=0.0)
            there = (column < inp)[:, None] & (ranks < rank)[None, :]
            a = tl.load(A + ranks.to(tl.int64)[None, :] * A_row + column[:, None], mask=there, other=0.0)
            total += _product(xs, a, INTERPRETED)
        tl.store(h_rows + ranks[None, :], total, mask=(row < length)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand(
    table, layers, layer, starts, lengths, slots, counts, weights, h, y, out, y_row, capacity,
    FIELDS: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tile of outputs for one item, and for those after it with the same rows."""
    item = tl.program_id(0)
    count, length = tl.load(counts + item), tl.load(lengths + item)
    if count == 0:
        return
    kind = y.dtype.element_ty
    row, column = tl.arange(0, ROWS), tl.program_id(1) * TILE + tl.arange(0, TILE)
    place = y + (tl.load(starts + item) + row).to(tl.int64)[:, None] * y_row + column[None, :]
    known = column < out
    inside = (row < length)[:, None] & known[None, :]
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for one in range(item, item + count):
        entry = table + (tl.load(slots + one).to(tl.int64) * layers + layer) * FIELDS
        rank, gain, shift = tl.load(entry + 6).to(tl.int32), tl.load(entry + 4), tl.load(entry + 5)
        if gain != 0:
            total *= tl.load(gain.to(tl.pointer_type(tl.float32)) + column, mask=known, other=1.0)[None, :]
        added = _added(entry, h, rank, one, row, length, column, known, capacity, kind, MOST, ROWS, RANKS, TILE, PARTS,
                       INTERPRETED)  # fmt: skip
        if shift != 0:
            added += tl.load(shift.to(tl.pointer_type(kind)) + column, mask=known, other=0.0).to(tl.float32)[None, :]
        total += tl.load(weights + one) * added
    tl.store(place, rounded(total, kind, INTERPRETED), mask=inside)


@triton.jit
def _added(
    entry, h, rank, item, row, length, column, known, capacity, kind: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """b * (B (d * h)) of one item."""
    B, B_row, B_column = tl.load(entry + 1).to(tl.pointer_type(kind)), tl.load(entry + 8), tl.load(entry + 9)
    d, b = tl.load(entry + 2), tl.load(entry + 3)
    added = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        there = (row < length)[:, None] & (ranks < rank)[None, :]
        z = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for part in range(PARTS):
            rows = ((tl.full((), part, tl.int64) * capacity + item) * ROWS + row)[:, None]
            z += tl.load(h + rows * MOST + ranks[None, :], mask=there, other=0.0)
        if d != 0:
            z *= tl.load(d.to(tl.pointer_type(kind)) + ranks, mask=ranks < rank, other=0.0).to(tl.float32)[None, :]
        where = B + column.to(tl.int64)[None, :] * B_row + ranks.to(tl.int64)[:, None] * B_column
        matrix = tl.load(where, mask=(ranks < rank)[:, None] & known[None, :], other=0.0)
        added += _product(rounded(z, kind, INTERPRETED), matrix, INTERPRETED)
    if b != 0:
        added *= tl.load(b.to(tl.pointer_type(kind)) + column, mask=known, other=0.0).to(tl.float32)[None, :]
    return added
