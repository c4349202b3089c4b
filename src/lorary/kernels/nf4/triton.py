"""Triton kernels for NF4 weights on a GPU; `reference` defines the format.

    dequantize   out = value[code] · absmax[block], rounded once
    gemv         y = x·Wᵀ + b for 1 to 16 rows of x, summed in float32; reads 4 bits per number of the weight

`dequantize` gives the numbers of `reference.dequantize_region`, bit for bit: its kernel is compiled without
contraction, so that the magnitude is a product and a sum, each rounded. One row of x is multiplied in float32, more
exactly than with a weight rounded to 16 bits; several rows use the tensor cores and round the weight.

Importing this needs Triton. Without a GPU, `TRITON_INTERPRET=1` runs the kernels on the CPU: a check, not a use.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorary.kernels.nf4.reference import NESTED, QuantizedTensor, tables
from lorary.kernels.triton_rounding import rounded

MOST = 16  # rows of x: the smallest tile of the tensor cores
PIECE = 64  # numbers of a row that are read at once; they lie within a block
_LARGEST = 4096  # most numbers of a block that `dequantize` reads at once
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def suits(quantized: QuantizedTensor) -> bool:
    """Whether `gemv` takes this weight: a matrix whose rows and blocks are whole pieces of 64 numbers."""
    parts = [part for part in quantized[:4] if part is not None]
    whole = len(quantized.shape) == 2 and quantized.shape[1] % PIECE == 0 and quantized.block % PIECE == 0
    return whole and math.prod(quantized.shape) > 0 and all(part.is_contiguous() for part in parts)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The dense weight, for any shape and block: value times magnitude in float32, rounded once.

    Args:
        quantized: the weight.
        dtype: of the result.
        out: contiguous, of as many numbers and of `dtype`: receives them, if given.

    Returns:
        `out`, or a new tensor [*shape].

    Raises:
        ValueError: if `out` has another size or dtype, or is not contiguous.
    """
    n = math.prod(quantized.shape)
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    if (out.numel(), out.dtype) != (n, dtype) or not out.is_contiguous():
        given = f"{out.numel()} numbers of {out.dtype}"
        raise ValueError(f"`out` has {given}; it has to be contiguous and have {n} of {dtype}")
    if n == 0:
        return out
    if dtype not in _TYPES:
        return out.copy_(dequantize(quantized, torch.float32).view(out.shape))
    piece = min(quantized.block, _LARGEST)
    pieces, at_once = -(-n // piece), max(1, 2048 // piece)
    sizes = (n, pieces, quantized.block // piece)
    constants = {"NESTED": NESTED, "PIECES": at_once, "HALF": piece // 2, "enable_fp_fusion": False}
    with _on(out):
        _dequantize[(-(-pieces // at_once),)](*_parts(quantized), out, *sizes, **constants, **_flags(quantized))
    return out


def gemv(x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`x·Wᵀ + b` for a few rows, as in token-by-token generation.

    Args:
        x: [tokens, inp] float32, bfloat16 or float16; 1 to 16 rows.
        quantized: [out, inp] a weight that `suits`.
        bias: [out] or None.

    Returns:
        [tokens, out] in x's dtype, rounded once. No gradient.

    Raises:
        ValueError: if the weight does not suit, or x has another width, dtype or number of rows.
    """
    tokens = x.shape[0]
    if not suits(quantized) or x.shape[1:] != quantized.shape[1:] or x.dtype not in _TYPES or not 0 < tokens <= MOST:
        what = f"x is {list(x.shape)} of {x.dtype}, the weight {list(quantized.shape)} in blocks of {quantized.block}"
        raise ValueError(f"{what}; this takes 1 to {MOST} rows of pieces of {PIECE} numbers in at most 32 bits")
    x = x.detach().contiguous()
    out, inp = quantized.shape
    y = x.new_empty((tokens, out))
    rows, pieces = (4, 16) if tokens == 1 else (32, 2)
    given = (*_parts(quantized), x, bias.detach().contiguous() if bias is not None else x, y)
    constants = {"NESTED": NESTED, "ROWS": rows, "PIECES": pieces, "HALF": PIECE // 2}
    with _on(x):
        flags = _flags(quantized) | {"BIAS": bias is not None, "enable_fp_fusion": True}
        kernel = _gemv_one if tokens == 1 else _gemv_few
        more = {} if tokens == 1 else {"tokens": tokens, "TOKENS": MOST}
        kernel[(-(-out // rows),)](*given, out, inp // PIECE, quantized.block // PIECE, **more, **constants, **flags)
    return y


def _parts(quantized: QuantizedTensor) -> tuple[Tensor, ...]:
    """The tensor arguments common to all kernels; absmax fills in for missing second-level tensors."""
    codes, absmax, nested, offset = quantized[:4]
    code, dynamic, _ = tables(codes.device)
    nested, offset = (nested, offset) if nested is not None and offset is not None else (absmax, absmax)
    return codes, absmax, nested, offset, code, dynamic


def _flags(quantized: QuantizedTensor) -> dict[str, bool]:
    interpreted = quantized.codes.device.type == "cpu"
    return {"DOUBLE": quantized.nested_absmax is not None, "INTERPRETED": interpreted}


def _on(tensor: Tensor) -> Any:
    """A context that launches kernels on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _magnitudes(absmax, nested, offset, dynamic, block, there, NESTED: tl.constexpr, DOUBLE: tl.constexpr):
    """float32: the magnitudes of the blocks with these indices."""
    kept = tl.load(absmax + block, mask=there, other=0)
    if DOUBLE:
        largest = tl.load(nested + block // NESTED, mask=there, other=0.0)
        kept = tl.load(dynamic + kept.to(tl.int32)) * largest + tl.load(offset)
    return kept


@triton.jit
def _dequantize(
    codes, absmax, nested, offset, code, dynamic, out, n, pieces, share,
    NESTED: tl.constexpr, PIECES: tl.constexpr, HALF: tl.constexpr,
    DOUBLE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """PIECES pieces of 2·HALF numbers each; `share` pieces make a block."""
    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    scale = _magnitudes(absmax, nested, offset, dynamic, piece // share, piece < pieces, NESTED, DOUBLE)[:, None]
    byte = piece[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(codes + byte, mask=2 * byte < n, other=0).to(tl.int32)
    numbers = tl.interleave(tl.load(code + (pair >> 4)) * scale, tl.load(code + (pair & 15)) * scale)
    place = piece[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + place, rounded(numbers, out.dtype.element_ty, INTERPRETED), mask=place < n)


@triton.jit
def _gemv_one(
    codes, absmax, nested, offset, code, dynamic, x, bias, y, height, across, share,
    NESTED: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, HALF: tl.constexpr,
    DOUBLE: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight, of `across` pieces each, times one x: summed per lane, and across lanes at the end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, HALF)
    total = tl.zeros((ROWS, PIECES, HALF), dtype=tl.float32)
    for first in range(0, across, PIECES):
        column = first + tl.arange(0, PIECES)
        there = (row < height)[:, None] & (column < across)[None, :]
        piece = row.to(tl.int64)[:, None] * across + column[None, :]
        scale = _magnitudes(absmax, nested, offset, dynamic, piece // share, there, NESTED, DOUBLE)
        pair = tl.load(codes + piece[:, :, None] * HALF + within[None, None, :], mask=there[:, :, None], other=0)
        pair = pair.to(tl.int32)
        place = 2 * (column[:, None] * HALF + within[None, :])
        even = tl.load(x + place, mask=(column < across)[:, None], other=0.0).to(tl.float32)
        odd = tl.load(x + place + 1, mask=(column < across)[:, None], other=0.0).to(tl.float32)
        numbers = tl.load(code + (pair >> 4)) * even[None, :, :] + tl.load(code + (pair & 15)) * odd[None, :, :]
        total += numbers * scale[:, :, None]
    sums = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        sums += tl.load(bias + row, mask=row < height, other=0.0).to(tl.float32)
    tl.store(y + row, rounded(sums, y.dtype.element_ty, INTERPRETED), mask=row < height)


@triton.jit
def _gemv_few(
    codes, absmax, nested, offset, code, dynamic, x, bias, y, height, across, share, tokens,
    TOKENS: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, HALF: tl.constexpr,
    DOUBLE: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times up to TOKENS rows of x: one product of the even columns, one of the odd."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    within = tl.arange(0, HALF)
    flat = tl.arange(0, PIECES * HALF)
    sums = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for first in range(0, across, PIECES):
        column = first + tl.arange(0, PIECES)
        there = (row < height)[:, None] & (column < across)[None, :]
        piece = row.to(tl.int64)[:, None] * across + column[None, :]
        scale = _magnitudes(absmax, nested, offset, dynamic, piece // share, there, NESTED, DOUBLE)[:, :, None]
        pair = tl.load(codes + piece[:, :, None] * HALF + within[None, None, :], mask=there[:, :, None], other=0)
        pair = pair.to(tl.int32)
        high = rounded(tl.load(code + (pair >> 4)) * scale, x.dtype.element_ty, INTERPRETED)
        low = rounded(tl.load(code + (pair & 15)) * scale, x.dtype.element_ty, INTERPRETED)
        place = 2 * (first * HALF + flat)
        known = (token < tokens)[:, None] & (place < 2 * HALF * across)[None, :]
        spot = token[:, None] * (2 * HALF * across) + place[None, :]
        even = tl.load(x + spot, mask=known, other=0.0)
        odd = tl.load(x + spot + 1, mask=known, other=0.0)
        if INTERPRETED:  # it would multiply the bits of 16-bit numbers
            even, odd, high, low = even.to(tl.float32), odd.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        sums += tl.dot(even, tl.trans(tl.reshape(high, (ROWS, PIECES * HALF))), input_precision="ieee")
        sums += tl.dot(odd, tl.trans(tl.reshape(low, (ROWS, PIECES * HALF))), input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + row, mask=row < height, other=0.0).to(tl.float32)[None, :]
    where = token[:, None] * height + row[None, :]
    sums = rounded(sums, y.dtype.element_ty, INTERPRETED)
    tl.store(y + where, sums, mask=(token < tokens)[:, None] & (row < height)[None, :])
