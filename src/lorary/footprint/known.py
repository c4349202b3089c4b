"""What layers hold whose words are well known, as formulas: the same as `adapters` finds by asking them, at once.

u is the size of the input, [T, inp] in the precision of the products, v that of the output, z of the R wide middle:

    kept        z for every layer whose B trains, the input once if any A trains, the output under a magnitude (DoRA)
    backward    3 u - z: the gradient's part from the adapter, the one from the weight, and their sum; a single layer
                gives its input back before that: 2 u - z; under a magnitude its output, too, but not less than 2 v.
                A packed layer: at least u and one tile of the weight
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorary.footprint.adapters import Held, Layer, held
from lorary.kernels.nf4_tiles import TILE
from lorary.placed import Placed

# the delta's word -> (the width R of its middle, whether its B is made anew of other tensors and kept)
_MIDDLES: dict[str, tuple[Callable[[Any], int], bool]] = {
    "LowRank": (lambda shapes: int(shapes["A"][0]), False),
    "Minis": (lambda shapes: int(shapes["A"][0]), False),
    "Spectral": (lambda shapes: int(shapes["Q"][0]), True),
    "Parallel": (lambda shapes: int(shapes["A"][0]), True),
}


def holds(layers: tuple[Layer, ...], inp: int, rows: int, dtype: torch.dtype) -> Held:
    """What these layers hold for one input [rows, inp]: by formula, and of words that have none by asking."""
    found = by_words(layers, inp, rows, dtype)
    return held(layers, inp, rows, dtype, dtype) if found is None else found


def by_words(layers: tuple[Layer, ...], inp: int, rows: int, dtype: torch.dtype) -> Held | None:
    """The formula, or None where a word has none."""
    if any(layer.full or (layer.placed is not None and not _known(layer.placed)) for layer in layers):
        return None
    e = dtype.itemsize
    u, extra, z = rows * inp * e, 0, 0
    keeps, outputs = False, []
    for layer in layers:
        if layer.placed is None:
            outputs.append(False)
            continue
        trained, shapes = layer.placed.method.trained, layer.placed.shapes
        middle, made = _MIDDLES[type(layer.placed.delta).__name__]
        R = middle(shapes)
        z = rows * R * e if _second(layer.placed) in trained else 0
        extra += z + (4 * layer.out * R if made else 0)
        keeps |= _first(layer.placed) in trained
        magnitude = "m" in shapes
        extra += 4 * layer.out if magnitude else 0
        outputs.append(magnitude)
    adapted = any(layer.placed is not None for layer in layers)
    takes = 3 * u - z
    if len(layers) == 1:
        takes = takes - (u if keeps else 0) if adapted else u
    v = rows * max(layer.out for layer in layers) * e
    if any(outputs):  # the output that was kept is given back first
        takes = max(takes - v, 2 * v)
    tiles = [min(TILE, layer.out * inp) * e for layer in layers if layer.storage is not None]
    return Held(keeps, tuple(outputs), extra, max([takes, *(u + tile for tile in tiles)]))


def _known(placed: Placed) -> bool:
    join = type(placed.method.join).__name__
    if type(placed.delta).__name__ not in _MIDDLES or placed.site.parts:
        return False
    still = join == "Direction" and not getattr(placed.method.join, "exact", True) and not placed.method.dropout
    return join == "Add" or still


def _first(placed: Placed) -> str:
    return str(placed.delta.known_as.get("A", "A"))


def _second(placed: Placed) -> str:
    return str(placed.delta.known_as.get("B", "B"))
