"""Products with a packed weight that is rebuilt a tile at a time, by the fastest means that the device has.

A tile is small enough to stay in the processor's cache between being written and being multiplied with, so the dense
weight goes through no memory at all. The forward pass takes tiles of rows, the backward pass tiles of columns: every
number of either result is summed in one product.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import without_autocast
from lorary.kernels.nf4.cpu import TYPES, features, native, readable
from lorary.kernels.nf4.reference import (
    AT_ONCE,
    NESTED,
    QuantizedTensor,
    magnitudes,
    matrix_shape,
    numbers_at,
    region,
    shapes_only,
)

TILE = 2**21  # numbers of the weight that are there at once, about
TILE_GPU = 2**26  # on a GPU, whose cache holds no tile: 128 MiB in 16 bits
FEW = 16  # rows of x up to which the compiled code takes the product without writing the weight down
EVEN = 64  # a tile is of a multiple of so many rows or columns
# what /proc/cpuinfo calls products of 16-bit numbers; without them they take longer than those of 32 bits
_SHORT = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
Span = tuple[int, int]


@lru_cache
def triton_kernels() -> Any:
    """`nf4_triton`, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("lorary.kernels.nf4.triton")


@lru_cache
def working_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What a product of this dtype is taken in: float32 for 16-bit numbers on processors that cannot multiply them."""
    if device != "cpu" or dtype not in _SHORT or not features():
        return dtype
    return dtype if _SHORT[dtype] & features() else torch.float32


def read(packed: QuantizedTensor, rows: Span, columns: Span, out: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Writes a rectangle of the weight, as a matrix of its last dimension.

    Args:
        packed: the weight.
        rows: (first, behind the last).
        columns: likewise.
        out: [rows, columns] of any floating dtype.
        dtype: what the numbers are rounded to, if not to `out`'s.

    Returns:
        `out`.
    """
    dtype = dtype or out.dtype
    if shapes_only(out, packed.codes) or out.numel() == 0:
        return out
    width = matrix_shape(packed.shape)[1]
    if out.is_cuda and columns == (0, width) and out.is_contiguous() and (kernels := triton_kernels()) is not None:
        kernels.unpack(rows_of(packed, *rows), out.dtype, out)
        return out
    compiled = native() if out.device.type == "cpu" and out.stride(1) == 1 and readable(packed) else None
    if compiled is not None and out.dtype in TYPES:
        compiled.unpack(packed, rows, columns, out, dtype)
        return out
    first = torch.float32 if compiled is not None and dtype not in TYPES else dtype
    made = out if out.dtype == first else torch.empty(out.shape, dtype=first, device=out.device)
    if compiled is None:
        region(packed, rows, columns, made)
    else:
        compiled.unpack(packed, rows, columns, made)
    return out if made is out else out.copy_(made)


def dequantize_into(packed: QuantizedTensor, out: Tensor) -> Tensor:
    """Writes the whole weight to `out` [height, width]."""
    height, width = matrix_shape(packed.shape)
    if out.is_cuda:
        whole = triton_kernels() is not None
    else:
        whole = out.dtype in TYPES and readable(packed) and native() is not None
    for top, bottom in [(0, height)] if whole else _spans(height, width):  # other means make more on the way
        read(packed, (top, bottom), (0, width), out[top:bottom])
    return out


def some_rows(packed: QuantizedTensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., width] the rows of the weight with these numbers (whole, of any shape)."""
    height, width = matrix_shape(packed.shape)
    out = torch.empty((*rows.shape, width), dtype=dtype, device=packed.codes.device)
    if shapes_only(out, rows) or out.numel() == 0:
        return out
    rows = rows.reshape(-1).to(out.device, torch.int64)
    if rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= height):
        raise IndexError(f"row {int(rows.min())} or {int(rows.max())} of a matrix of {height} rows")
    compiled = native() if dtype in TYPES and readable(packed) else None
    if compiled is not None:
        compiled.unpack_rows(packed, rows, out.view(-1, width))
        return out
    columns = torch.arange(width, device=out.device)
    step = max(1, AT_ONCE // width)
    for some, part in zip(rows.split(step), out.view(-1, width).split(step), strict=True):
        part.copy_(numbers_at(packed, some.unsqueeze(1) * width + columns))
    return out


def product(x: Tensor, packed: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """[..., out] x·Wᵀ + b: some columns from each tile of rows of the weight."""
    height, width = packed.shape
    flat = x.reshape(math.prod(x.shape[:-1]), width)
    if width == 0:  # PyTorch's sum of nothing and a bias would not be written to a view
        none = flat.new_zeros((*x.shape[:-1], height))
        return none if bias is None else none + bias
    with without_autocast(x.device):
        y = _with_few_rows(flat, packed, bias)
        if y is None:
            y = flat.new_empty((flat.shape[0], height))
            work = flat.to(working_dtype(x.dtype, x.device.type))
            for top, bottom in _row_spans(packed, x.device):
                tile = _scratch(work, bottom - top, width)
                W = read(packed, (top, bottom), (0, width), tile, x.dtype)
                _multiply(work, W.t(), y[:, top:bottom], None if bias is None else bias[top:bottom])
    return y.view(*x.shape[:-1], height)


def _multiply(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = left·right + bias, rounded to out's dtype where that is another."""
    if left.dtype != out.dtype:
        out.copy_(left @ right if bias is None else torch.addmm(bias.to(left.dtype), left, right))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def _with_few_rows(x: Tensor, packed: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """[tokens, out] where there is a kernel that looks the weight up while it multiplies, else None."""
    if not 0 < x.shape[0] <= FEW or x.dtype not in TYPES or shapes_only(x, packed.codes):
        return None
    if x.is_cuda:
        kernels = triton_kernels()
        return kernels.gemv(x, packed, bias) if kernels is not None and kernels.suits(packed) else None
    suits = packed.shape[1] % packed.block == 0 and packed.block % 64 == 0
    compiled = native() if suits and readable(packed) else None
    if compiled is None:
        return None
    y = compiled.times(x.to(torch.float32).contiguous(), packed, x.dtype)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def gradient(gy: Tensor, packed: QuantizedTensor) -> Tensor:
    """[..., inp] gy·W: some columns from each tile of columns of the weight; on a GPU, a sum over tiles of rows."""
    height, width = packed.shape
    flat = gy.reshape(math.prod(gy.shape[:-1]), height)
    with without_autocast(gy.device):
        made = _by_rows(flat, packed) if gy.is_cuda else _by_columns(flat, packed)
    return made.view(*gy.shape[:-1], width)


def _by_columns(gy: Tensor, packed: QuantizedTensor) -> Tensor:
    height, width = packed.shape
    gx = gy.new_empty((gy.shape[0], width))
    work = gy.to(working_dtype(gy.dtype, gy.device.type))
    for left, right in _spans(width, height):
        tile = _scratch(work, height, right - left)
        _multiply(work, read(packed, (0, height), (left, right), tile, gy.dtype), gx[:, left:right])
    return gx


def _by_rows(gy: Tensor, packed: QuantizedTensor) -> Tensor:
    """The sum over tiles is taken in 32 bits."""
    height, width = packed.shape
    sum_: Tensor | None = None
    for top, bottom in _row_spans(packed, gy.device):
        tile = _scratch(gy, bottom - top, width)
        part = gy[:, top:bottom] @ read(packed, (top, bottom), (0, width), tile)
        if bottom - top == height:
            return part
        sum_ = part.to(torch.promote_types(part.dtype, torch.float32)) if sum_ is None else sum_.add_(part)
    return gy.new_zeros((gy.shape[0], width)) if sum_ is None else sum_.to(gy.dtype)


# --- tiles ------------------------------------------------------------------------------------------------------------


def _spans(total: int, across: int) -> list[Span]:
    """(first, behind the last) of about equal pieces of `total` rows of `across` numbers."""
    pieces = max(1, -(-total * across // TILE))
    size = max(EVEN, -(-total // (pieces * EVEN)) * EVEN)
    return [(start, min(total, start + size)) for start in range(0, total, size)]


def _row_spans(packed: QuantizedTensor, device: torch.device) -> list[Span]:
    """Pieces of rows; on a GPU of so many that second-level blocks begin with them, so that a tile is a view."""
    height, width = matrix_shape(packed.shape)
    if device.type == "cpu":
        return _spans(height, width)
    fit = packed.block * NESTED // math.gcd(packed.block * NESTED, max(1, width))
    size = max(1, TILE_GPU // max(1, width) // fit) * fit
    return [(start, min(height, start + size)) for start in range(0, height, size)]


class _Kept(threading.local):
    memory: Tensor | None = None


_kept = _Kept()


def _scratch(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] memory for one tile of `like`'s dtype, which the next call takes again.

    On the CPU a thread keeps its last one: fresh memory has to be cleared by the system, page by page, which takes
    longer than filling it.
    """
    if like.device.type != "cpu" or shapes_only(like):
        return like.new_empty((rows, columns))
    bytes_ = rows * columns * like.element_size()
    if _kept.memory is None or _kept.memory.numel() < bytes_:
        with torch.inference_mode(False):
            _kept.memory = torch.empty(bytes_, dtype=torch.uint8, device="cpu")
    return _kept.memory[:bytes_].view(like.dtype).view(rows, columns)


def rows_of(packed: QuantizedTensor, top: int, bottom: int) -> QuantizedTensor:
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
        return QuantizedTensor(codes, packed.absmax[first:last], None, None, (bottom - top, width), packed.block)
    if first % NESTED:
        decoded = magnitudes(packed, torch.arange(first, last, device=codes.device))
        return QuantizedTensor(codes, decoded, None, None, (bottom - top, width), packed.block)
    nested = packed.nested_absmax[first // NESTED : -(-last // NESTED)]
    parts = (codes, packed.absmax[first:last], nested, packed.nested_offset)
    return QuantizedTensor(*parts, (bottom - top, width), packed.block)
