"""Products with an NF4 weight that is dequantised tile by tile, with the fastest code for the device.

A tile stays in the processor's cache between being written and being multiplied, so the dense weight never reaches main
memory. The forward pass takes tiles of rows, the backward pass tiles of columns: each number of a result is one dot
product.
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
from lorary.kernels.native import cpu_features
from lorary.kernels.nf4.cpu import TYPES, is_readable, native
from lorary.kernels.nf4.reference import (
    AT_ONCE,
    NESTED,
    QuantizedTensor,
    dequantize_at,
    dequantize_region,
    magnitudes,
    matrix_shape,
    shapes_only,
)
from lorary.kernels.torch_internals import UNSAFE_VIEW

TILE = 2**21  # dense numbers at a time, about
TILE_GPU = 2**26  # on a GPU, where a tile does not fit the cache: 128 MiB in 16 bits
FEW = 16  # up to this many rows of x the compiled code multiplies without writing the weight
EVEN = 64  # a tile has a multiple of this many rows or columns
# flags of /proc/cpuinfo for 16-bit products; without them 32-bit products are faster
_SHORT = {torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"}, torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"}}
Span = tuple[int, int]


@lru_cache
def triton_kernels() -> Any:
    """The module of Triton kernels, or None if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("lorary.kernels.nf4.triton")


@lru_cache
def working_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype to multiply in: float32 for 16-bit numbers on processors that cannot multiply them."""
    if device != "cpu" or dtype not in _SHORT or not cpu_features():
        return dtype
    return dtype if _SHORT[dtype] & cpu_features() else torch.float32


def dequantize_tile(
    quantized: QuantizedTensor, rows: Span, columns: Span, out: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Writes a rectangle of the weight, as a matrix [height, width].

    Args:
        quantized: the weight.
        rows, columns: (start, stop).
        out: [rows, columns] of any floating dtype.
        dtype: to round to; `out`'s by default.

    Returns:
        `out`.
    """
    dtype = dtype or out.dtype
    if shapes_only(out, quantized.codes) or out.numel() == 0:
        return out
    width = matrix_shape(quantized.shape)[1]
    if out.is_cuda and columns == (0, width) and out.is_contiguous() and (kernels := triton_kernels()) is not None:
        kernels.dequantize(row_slice(quantized, *rows), out.dtype, out)
        return out
    compiled = native() if out.device.type == "cpu" and out.stride(1) == 1 and is_readable(quantized) else None
    if compiled is not None and out.dtype in TYPES:
        compiled.dequantize(quantized, rows, columns, out, dtype)
        return out
    first = torch.float32 if compiled is not None and dtype not in TYPES else dtype
    target = out if out.dtype == first else torch.empty(out.shape, dtype=first, device=out.device)
    if compiled is None:
        dequantize_region(quantized, rows, columns, target)
    else:
        compiled.dequantize(quantized, rows, columns, target)
    return out if target is out else out.copy_(target)


def dequantize_into(quantized: QuantizedTensor, out: Tensor) -> Tensor:
    """Writes the whole weight to `out` [height, width]."""
    height, width = matrix_shape(quantized.shape)
    if out.is_cuda:
        whole = triton_kernels() is not None
    else:
        whole = out.dtype in TYPES and is_readable(quantized) and native() is not None
    # without a kernel for the whole weight, temporaries are larger than a tile
    for top, bottom in [(0, height)] if whole else _spans(height, width):
        dequantize_tile(quantized, (top, bottom), (0, width), out[top:bottom])
    return out


def gather_rows(quantized: QuantizedTensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., width] the rows of the weight with these indices (integers of any shape)."""
    height, width = matrix_shape(quantized.shape)
    out = torch.empty((*rows.shape, width), dtype=dtype, device=quantized.codes.device)
    if shapes_only(out, rows) or out.numel() == 0:
        return out
    rows = rows.reshape(-1).to(out.device, torch.int64)
    if rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= height):
        raise IndexError(f"row {int(rows.min())} or {int(rows.max())} of a matrix of {height} rows")
    compiled = native() if dtype in TYPES and is_readable(quantized) else None
    if compiled is not None:
        compiled.dequantize_rows(quantized, rows, out.view(-1, width))
        return out
    columns = torch.arange(width, device=out.device)
    step = max(1, AT_ONCE // width)
    for some, part in zip(rows.split(step), out.view(-1, width).split(step), strict=True):
        part.copy_(dequantize_at(quantized, some.unsqueeze(1) * width + columns))
    return out


def product(x: Tensor, quantized: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """[..., out] x·Wᵀ + b: each tile of rows of the weight gives some columns."""
    height, width = quantized.shape
    flat = x.reshape(math.prod(x.shape[:-1]), width)
    if width == 0:  # for an empty product PyTorch does not write the bias to a view
        none = flat.new_zeros((*x.shape[:-1], height))
        return none if bias is None else none + bias
    with without_autocast(x.device):
        y = _few_rows(flat, quantized, bias)
        if y is None:
            y = flat.new_empty((flat.shape[0], height))
            work = flat.to(working_dtype(x.dtype, x.device.type))
            for top, bottom in _row_spans(quantized, x.device):
                tile = _scratch(work, bottom - top, width)
                W = dequantize_tile(quantized, (top, bottom), (0, width), tile, x.dtype)
                _multiply(work, W.t(), y[:, top:bottom], None if bias is None else bias[top:bottom])
    # not a view: a model may write into the output in place, which autograd refuses of views (Llama 4 does)
    return UNSAFE_VIEW(y, (*x.shape[:-1], height))  # type: ignore[no-any-return]


def _multiply(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = left·right + bias, rounded to out's dtype."""
    if left.dtype != out.dtype:
        out.copy_(left @ right if bias is None else torch.addmm(bias.to(left.dtype), left, right))
    elif bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def _few_rows(x: Tensor, quantized: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """[tokens, out] from a kernel that dequantises in registers; None if there is none for these tensors."""
    if not 0 < x.shape[0] <= FEW or x.dtype not in TYPES or shapes_only(x, quantized.codes):
        return None
    if x.is_cuda:
        kernels = triton_kernels()
        return kernels.gemv(x, quantized, bias) if kernels is not None and kernels.suits(quantized) else None
    suits = quantized.shape[1] % quantized.block == 0 and quantized.block % 64 == 0
    compiled = native() if suits and is_readable(quantized) else None
    if compiled is None:
        return None
    y = compiled.linear(x.to(torch.float32).contiguous(), quantized, x.dtype)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def gradient(gy: Tensor, quantized: QuantizedTensor) -> Tensor:
    """[..., inp] gy·W: each tile of columns gives some columns; on a GPU, a sum over tiles of rows."""
    height, width = quantized.shape
    flat = gy.reshape(math.prod(gy.shape[:-1]), height)
    with without_autocast(gy.device):
        gx = _by_rows(flat, quantized) if gy.is_cuda else _by_columns(flat, quantized)
    return gx.view(*gy.shape[:-1], width)


def _by_columns(gy: Tensor, quantized: QuantizedTensor) -> Tensor:
    height, width = quantized.shape
    gx = gy.new_empty((gy.shape[0], width))
    work = gy.to(working_dtype(gy.dtype, gy.device.type))
    for left, right in _spans(width, height):
        tile = _scratch(work, height, right - left)
        _multiply(work, dequantize_tile(quantized, (0, height), (left, right), tile, gy.dtype), gx[:, left:right])
    return gx


def _by_rows(gy: Tensor, quantized: QuantizedTensor) -> Tensor:
    """A sum over tiles of rows, in 32 bits."""
    height, width = quantized.shape
    sum_: Tensor | None = None
    for top, bottom in _row_spans(quantized, gy.device):
        tile = _scratch(gy, bottom - top, width)
        part = gy[:, top:bottom] @ dequantize_tile(quantized, (top, bottom), (0, width), tile)
        if bottom - top == height:
            return part
        sum_ = part.to(torch.promote_types(part.dtype, torch.float32)) if sum_ is None else sum_.add_(part)
    return gy.new_zeros((gy.shape[0], width)) if sum_ is None else sum_.to(gy.dtype)


# --- tiles ------------------------------------------------------------------------------------------------------------


def _spans(total: int, across: int) -> list[Span]:
    """(start, stop) of about equal pieces of `total` rows of `across` numbers."""
    pieces = max(1, -(-total * across // TILE))
    size = max(EVEN, -(-total // (pieces * EVEN)) * EVEN)
    return [(start, min(total, start + size)) for start in range(0, total, size)]


def _row_spans(quantized: QuantizedTensor, device: torch.device) -> list[Span]:
    """(start, stop) of tiles of rows; on a GPU they are aligned to second-level blocks, so that a tile is a view."""
    height, width = matrix_shape(quantized.shape)
    if device.type == "cpu":
        return _spans(height, width)
    fit = quantized.block * NESTED // math.gcd(quantized.block * NESTED, max(1, width))
    size = max(1, TILE_GPU // max(1, width) // fit) * fit
    return [(start, min(height, start + size)) for start in range(0, height, size)]


class _Memory(threading.local):
    bytes: Tensor | None = None


_memory = _Memory()


def _scratch(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] memory for one tile of `like`'s dtype, reused by the next call.

    On the CPU each thread keeps its own: the system clears fresh memory page by page, which is slower than filling it.
    """
    if like.device.type != "cpu" or shapes_only(like):
        return like.new_empty((rows, columns))
    bytes_ = rows * columns * like.element_size()
    if _memory.bytes is None or _memory.bytes.numel() < bytes_:
        with torch.inference_mode(False):
            _memory.bytes = torch.empty(bytes_, dtype=torch.uint8, device="cpu")
    return _memory.bytes[:bytes_].view(like.dtype).view(rows, columns)


def row_slice(quantized: QuantizedTensor, top: int, bottom: int) -> QuantizedTensor:
    """Rows [top, bottom) of a quantised matrix as a quantised matrix of views; a block must begin at `top`.

    Raises:
        ValueError: if a block also holds numbers of the row before.
    """
    height, width = matrix_shape(quantized.shape)
    start, end = top * width, bottom * width
    if (top, bottom) == (0, height):
        return quantized
    if start % quantized.block:
        raise ValueError(f"row {top} of {width} numbers does not begin a block of {quantized.block}")
    first, last = start // quantized.block, -(-end // quantized.block)
    codes = quantized.codes[start // 2 : -(-end // 2)]
    if quantized.nested_absmax is None:
        return QuantizedTensor(codes, quantized.absmax[first:last], None, None, (bottom - top, width), quantized.block)
    if first % NESTED:
        decoded = magnitudes(quantized, torch.arange(first, last, device=codes.device))
        return QuantizedTensor(codes, decoded, None, None, (bottom - top, width), quantized.block)
    nested = quantized.nested_absmax[first // NESTED : -(-last // NESTED)]
    parts = (codes, quantized.absmax[first:last], nested, quantized.nested_offset)
    return QuantizedTensor(*parts, (bottom - top, width), quantized.block)
