"""The NF4 format in plain operations: from numbers to 4-bit codes and back.

A weight is flattened row by row and cut into blocks of `block` numbers. A block stores its largest magnitude `absmax`
and, for each number, the index of the nearest of 16 fixed values to number / absmax. With double quantisation the
magnitudes, less their mean, are stored as one byte each: the nearest of 256 fixed values after division by the largest
of 256 magnitudes. Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3; the values, the order of the codes in a
byte and the rounding are bitsandbytes', bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.kernels.torch_internals import FakeTensor

# The 16 values: quantiles of the normal distribution, and zero.
# fmt: off
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=torch.float32, device="cpu")
# fmt: on
MIDDLES = (CODE[:-1] + CODE[1:]) / 2  # [15]
NESTED = 256  # magnitudes that share one second-level magnitude
AT_ONCE = 2**20  # numbers that are quantised or looked up at a time
_SMALLEST = 1e-38  # lower bound of an absmax as a divisor


def _dynamic() -> Tensor:
    """The 256 values of the signed dynamic map: 2^i between 10^(i-7) and 10^(i-6) for i = 0..6, with both signs."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


DYNAMIC = _dynamic()
Piece = Callable[[Tensor, int, Tensor, Tensor], None]  # the signature of `quantize_piece`


class QuantizedTensor(NamedTuple):
    """An NF4 weight as plain tensors in bitsandbytes' layout.

    Args:
        codes: uint8 [ceil(n / 2), 1] for n numbers, the first of a pair in the high nibble, row by row.
        absmax: [ceil(n / block)] largest magnitude of a block: float32, or uint8 with double quantisation.
        nested_absmax: float32 [ceil(blocks / 256)], or None without double quantisation.
        nested_offset: float32 [] the mean that was subtracted from the magnitudes, or None.
        shape: of the weight, (out, inp) for a linear layer.
        block: numbers that share a magnitude.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    block: int


def shapes_only(*tensors: Tensor) -> bool:
    """Whether one of the tensors has no data: it is on the meta device, or fake."""
    return any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


@lru_cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 16 values, the 256 of the dynamic map, and [256, 2] the pair of values of each byte, on a device."""
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([CODE[byte >> 4], CODE[byte & 15]], 1)
    return CODE.to(device), DYNAMIC.to(device), pairs.to(device)


# --- from numbers to codes --------------------------------------------------------------------------------------------


def quantize(W: Tensor, block: int, double: bool, piece: Piece) -> QuantizedTensor:
    """The NF4 form of a weight; `piece` quantises some rows at a time. See `nf4.quantize`."""
    if block < 2 or block & (block - 1):
        raise ValueError(f"block is {block}; it has to be a power of two from 2")
    if not W.dtype.is_floating_point:
        raise ValueError(f"the weight is of {W.dtype}; only floating numbers can be quantised")
    n = W.numel()
    codes = torch.empty((-(-n // 2), 1), dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-n // block), dtype=torch.float32, device=W.device)
    if not shapes_only(W, codes):
        for start, numbers in _pieces(W.detach(), block):
            end = start + numbers.numel()
            bytes_, magnitudes = codes[start // 2 : -(-end // 2), 0], absmax[start // block : -(-end // block)]
            piece(numbers, block, bytes_, magnitudes)
        if not bool(absmax.isfinite().all()):
            raise ValueError("a number of the weight is NaN, infinite or outside the range of float32")
    if not double:
        return QuantizedTensor(codes, absmax, None, None, tuple(W.shape), block)
    nested = quantize_magnitudes(absmax)
    if not shapes_only(absmax) and not bool(nested[2].isfinite()):
        raise ValueError("the mean magnitude is outside the range of float32: quantise it without double quantisation")
    return QuantizedTensor(codes, *nested, tuple(W.shape), block)


def _pieces(W: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """(index of its first number, float32 [m] numbers) of each piece; m is whole blocks, except in the last piece."""
    rows = W.reshape(-1) if W.is_contiguous() or W.dim() == 0 else W
    width = math.prod(rows.shape[1:])
    if width == 0:
        return
    fit = block // math.gcd(block, width)  # this many rows are whole blocks
    step = -(-max(1, AT_ONCE // width) // fit) * fit
    for first in range(0, rows.shape[0], step):
        yield first * width, rows[first : first + step].reshape(-1).to(torch.float32)


def quantize_piece(w: Tensor, block: int, codes: Tensor, absmax: Tensor) -> None:
    """Writes the codes uint8 [ceil(m / 2)] and magnitudes [ceil(m / block)] of w, float32 [m].

    The last block may be short.
    """
    end = w.numel() - w.numel() % block
    blocks = w[:end].view(-1, block)
    largest = blocks.abs().amax(1) if end else w.new_empty(0)
    v = (blocks * (1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)
    if end < w.numel():  # bitsandbytes divides a short block, and stores the bounded magnitude
        rest = w[end:].abs().amax().clamp(min=_SMALLEST).view(1)
        largest, v = torch.cat([largest, rest]), torch.cat([v, w[end:] / rest])
    # the number of midpoints below v; ties take the lower value
    index = torch.bucketize(v.clamp_(-1, 1), MIDDLES.to(w.device), out_int32=True).to(torch.uint8)
    if index.numel() % 2:
        index = torch.cat([index, index.new_full((1,), 7)])
    codes.copy_(index[0::2] << 4 | index[1::2])
    absmax.copy_(largest)


def quantize_magnitudes(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: (uint8 [blocks], float32 [ceil(blocks / 256)], the mean float32 []).

    Takes the nearest of the 256 values, as bitsandbytes does on a GPU; on the CPU it may take a neighbour.
    """
    blocks = absmax.numel()
    coded = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(-(-blocks // NESTED), dtype=torch.float32, device=absmax.device)
    if shapes_only(absmax, coded) or blocks == 0:
        return coded, nested, torch.zeros((), dtype=torch.float32, device=absmax.device)
    offset = absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED)).view(-1, NESTED)
    largest = centred.abs().amax(1)
    v = (centred * (1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(1)).view(-1)[:blocks]
    dynamic = tables(absmax.device)[1]
    coded.copy_(torch.bucketize(v, (dynamic[:-1] + dynamic[1:]) / 2, out_int32=True))
    return coded, nested.copy_(largest), offset


# --- from codes to numbers --------------------------------------------------------------------------------------------


def magnitudes(quantized: QuantizedTensor, index: Tensor) -> Tensor:
    """float32: the magnitudes of the blocks with these indices (int64, any shape)."""
    if quantized.nested_absmax is None or quantized.nested_offset is None:
        return quantized.absmax[index]
    dynamic = tables(quantized.codes.device)[1]
    return dynamic[quantized.absmax[index].int()] * quantized.nested_absmax[index // NESTED] + quantized.nested_offset


def dequantize_at(quantized: QuantizedTensor, index: Tensor) -> Tensor:
    """float32: the numbers at these indices (int64, any shape) of the flattened weight."""
    byte = quantized.codes.view(-1)[index // 2]
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    return tables(quantized.codes.device)[0][code.int()] * magnitudes(quantized, index // quantized.block)


def dequantize_region(
    quantized: QuantizedTensor, rows: tuple[int, int], columns: tuple[int, int], out: Tensor
) -> Tensor:
    """Writes a rectangle of the weight, as a matrix [height, width], to `out`; a table maps bytes to pairs of values.

    Args:
        quantized: the weight; other than two dimensions are folded as in `matrix_shape`.
        rows, columns: (start, stop).
        out: [rows, columns] of any floating dtype and strides; the product of value and magnitude is rounded once.
    """
    width = matrix_shape(quantized.shape)[1]
    (top, bottom), (left, right) = rows, columns
    group = math.gcd(quantized.block, width, left, right)  # this many neighbours share a magnitude
    starts = torch.arange(top, bottom, device=out.device).unsqueeze(1) * width
    starts = starts + torch.arange(left, right, group, device=out.device)
    if group == 1:
        return out.copy_(dequantize_at(quantized, starts))
    codes = quantized.codes.view(-1, width // 2)[top:bottom, left // 2 : right // 2].int()
    scale = magnitudes(quantized, starts // quantized.block).unsqueeze(2)  # [rows, groups, 1]
    numbers = tables(out.device)[2][codes].view(*scale.shape[:2], group)  # from [rows, columns / 2, 2]
    return out.copy_(numbers.mul_(scale).view(out.shape))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a shape: the product of all dimensions but the last, and the last."""
    width = shape[-1] if shape else 1
    return math.prod(shape[:-1]) if width else 0, width
