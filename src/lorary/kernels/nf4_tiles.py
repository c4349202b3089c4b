"""Products with a packed weight that is rebuilt a tile at a time, by the fastest means that the device has.

A tile is small enough to stay in the processor's cache between being written and being multiplied with, so the dense
weight goes through no memory at all. The forward pass takes tiles of rows, the backward pass tiles of columns: every
number of either result is summed in one product.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import without_autocast
from lorary.kernels.nf4_native import TYPES, native, readable
from lorary.kernels.nf4_values import NESTED, Packed, magnitudes, matrix_shape, region, shapes_only

TILE = 2**20  # numbers of the weight that are there at once
TILE_GPU = 2**26  # on a GPU, whose cache holds no tile: 128 MiB in 16 bits
FEW = 8  # rows of x up to which the compiled code takes the product without writing the weight down


@lru_cache
def triton_kernels() -> Any:
    """`nf4_triton`, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("lorary.kernels.nf4_triton")


def read(packed: Packed, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> Tensor:
    """Writes a rectangle of the weight, as a matrix of its last dimension, to `out` [rows, columns]; returns it."""
    if shapes_only(out, packed.codes) or out.numel() == 0:
        return out
    width = matrix_shape(packed.shape)[1]
    if out.is_cuda and columns == (0, width) and out.is_contiguous() and (kernels := triton_kernels()) is not None:
        kernels.unpack(rows_of(packed, *rows), out.dtype, out)
        return out
    compiled = native() if out.device.type == "cpu" and out.stride(1) == 1 and readable(packed) else None
    if compiled is None:
        return region(packed, rows, columns, out)
    if out.dtype in TYPES:
        compiled.unpack(packed, rows, columns, out)
        return out
    wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    compiled.unpack(packed, rows, columns, wide)
    return out.copy_(wide)


def unpack_into(packed: Packed, out: Tensor) -> Tensor:
    """Writes the whole weight to `out` [height, width]."""
    height, width = matrix_shape(packed.shape)
    # the compiled code and the kernels need no tiles, other means do, for what they make on the way
    step = max(1, height) if out.dtype in TYPES and readable(packed) and native() else _rows(packed, out.device)
    for top in range(0, height, step):
        bottom = min(height, top + step)
        read(packed, (top, bottom), (0, width), out[top:bottom])
    return out


def product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """[..., out] x·Wᵀ + b: some columns from each tile of rows of the weight."""
    height, width = packed.shape
    flat = x.reshape(-1, width)
    with without_autocast(x.device):
        y = _with_few_rows(flat, packed, bias)
        if y is None:
            y = flat.new_empty((flat.shape[0], height))
            step = _rows(packed, x.device)
            tile = y.new_empty((min(step, height), width))
            for top in range(0, height, step):
                bottom = min(height, top + step)
                W = read(packed, (top, bottom), (0, width), tile[: bottom - top])
                if bias is None:
                    torch.mm(flat, W.t(), out=y[:, top:bottom])
                else:
                    torch.addmm(bias[top:bottom], flat, W.t(), out=y[:, top:bottom])
    return y.view(*x.shape[:-1], height)


def _with_few_rows(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor | None:
    """[tokens, out] where there is a kernel that looks the weight up while it multiplies, else None."""
    width, block = packed.shape[1], packed.block
    if not 0 < x.shape[0] <= FEW or x.dtype not in TYPES or width % block or block % 64 or shapes_only(x, packed.codes):
        return None
    if x.is_cuda and (kernels := triton_kernels()) is not None:
        made: Tensor = kernels.gemv(x, packed, bias)
        return made
    compiled = native() if x.device.type == "cpu" and readable(packed) else None
    if compiled is None:
        return None
    y = compiled.times(x.to(torch.float32).contiguous(), packed, x.dtype)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def gradient(gy: Tensor, packed: Packed) -> Tensor:
    """[..., inp] gy·W: some columns from each tile of columns of the weight; on a GPU, a sum over tiles of rows."""
    height, width = packed.shape
    flat = gy.reshape(-1, height)
    with without_autocast(gy.device):
        made = _by_rows(flat, packed) if gy.is_cuda else _by_columns(flat, packed)
    return made.view(*gy.shape[:-1], width)


def _by_columns(gy: Tensor, packed: Packed) -> Tensor:
    height, width = packed.shape
    gx = gy.new_empty((gy.shape[0], width))
    step = max(1, TILE // max(1, height) // packed.block) * packed.block
    tile = gy.new_empty(height * min(step, width))
    for left in range(0, width, step):
        right = min(width, left + step)
        part = tile[: height * (right - left)].view(height, right - left)
        torch.mm(gy, read(packed, (0, height), (left, right), part), out=gx[:, left:right])
    return gx


def _by_rows(gy: Tensor, packed: Packed) -> Tensor:
    """The sum over tiles is taken in 32 bits."""
    height, width = packed.shape
    step = _rows(packed, gy.device)
    tile, sum_ = gy.new_empty((min(step, height), width)), None
    for top in range(0, height, step):
        bottom = min(height, top + step)
        part = gy[:, top:bottom] @ read(packed, (top, bottom), (0, width), tile[: bottom - top])
        if step >= height:
            return part
        sum_ = part.to(torch.promote_types(part.dtype, torch.float32)) if sum_ is None else sum_.add_(part)
    return gy.new_zeros((gy.shape[0], width)) if sum_ is None else sum_.to(gy.dtype)


def _rows(packed: Packed, device: torch.device) -> int:
    """How many rows are a tile; on a GPU a number of them that second-level blocks fit, so that a tile is a view."""
    height, width = matrix_shape(packed.shape)
    if device.type == "cpu":
        return max(1, TILE // max(1, width))
    fit = packed.block * NESTED // math.gcd(packed.block * NESTED, max(1, width))
    return max(1, min(height, max(1, TILE_GPU // max(1, width) // fit) * fit))


def rows_of(packed: Packed, top: int, bottom: int) -> Packed:
    """Some rows of a packed matrix as a packed matrix: views, where its blocks begin at `top`.

    Raises:
        ValueError: if a block, or a byte, holds numbers of the row before.
    """
    height, width = matrix_shape(packed.shape)
    start, end = top * width, bottom * width
    if (top, bottom) == (0, height):
        return packed
    if start % packed.block:
        raise ValueError(f"row {top} of {width} numbers does not begin a block of {packed.block}")
    first, last = start // packed.block, -(-end // packed.block)
    codes = packed.codes[start // 2 : -(-end // 2)]
    if packed.nested_absmax is None:
        return Packed(codes, packed.absmax[first:last], None, None, (bottom - top, width), packed.block)
    if first % NESTED:
        decoded = magnitudes(packed, torch.arange(first, last, device=codes.device))
        return Packed(codes, decoded, None, None, (bottom - top, width), packed.block)
    nested = packed.nested_absmax[first // NESTED : -(-last // NESTED)]
    parts = (codes, packed.absmax[first:last], nested, packed.nested_offset)
    return Packed(*parts, (bottom - top, width), packed.block)
