"""4-bit weights: packed, unpacked, and multiplied with, without the dense weight ever being there as a whole.

What the bytes mean is in `nf4_values`. A product rebuilds the weight a tile at a time, in the forward pass and again
in the backward pass, and keeps nothing but what is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorary.kernels.low_rank import autocasting, without_autocast
from lorary.kernels.nf4_values import (
    CODE,
    DYNAMIC,
    Packed,
    matrix_shape,
    numbers_at,
    pack,
    region,
    shapes_only,
)

__all__ = ["CODE", "DYNAMIC", "Packed", "backend", "pack", "times", "unpack", "unpack_rows"]

TILE = 2**20  # numbers of the weight that are there at once, on the CPU


def backend() -> str:
    """How packed weights are read on the CPU: by compiled code, or by a table."""
    return "table"


def unpack(packed: Packed, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The numbers of a packed weight: value times magnitude in float32, rounded once to `dtype`.

    Args:
        packed: the weight.
        dtype: of the result.
        out: contiguous, of the weight's shape and of `dtype`: where the numbers are written, if given.

    Returns:
        [*shape] `out`, or a new tensor on the weight's device.

    Raises:
        ValueError: if `out` has another shape, dtype or device, or is not contiguous.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    wanted, given = (packed.shape, dtype, packed.codes.device), (tuple(out.shape), out.dtype, out.device)
    if wanted != given or not out.is_contiguous():
        raise ValueError(f"`out` has shape, dtype and device {given}; it has to be contiguous and {wanted}")
    height, width = matrix_shape(packed.shape)
    matrix = out.detach().view(height, width)
    step = max(1, TILE // max(1, width))
    for top in range(0, height, step):
        bottom = min(height, top + step)
        _fill(packed, (top, bottom), (0, width), matrix[top:bottom])
    return out


def unpack_rows(packed: Packed, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of a packed matrix, as an embedding takes them.

    Args:
        packed: [height, width] the matrix.
        rows: [...] whole numbers in [0, height).
        dtype: of the result.

    Returns:
        [..., width]
    """
    width = matrix_shape(packed.shape)[1]
    out = torch.empty((*rows.shape, width), dtype=dtype, device=packed.codes.device)
    if shapes_only(out, rows):
        return out
    columns = torch.arange(width, device=out.device)
    step = max(1, TILE // max(1, width))
    for ids, part in zip(rows.reshape(-1).long().split(step), out.view(-1, width).split(step), strict=True):
        part.copy_(numbers_at(packed, ids.unsqueeze(1) * width + columns))
    return out


def times(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`x·Wᵀ + b` with a packed W in x's dtype, or in autocast's, as a frozen linear layer computes it.

    Args:
        x: [..., inp] floating numbers.
        packed: [out, inp] the weight.
        bias: [out] or None.

    Returns:
        [..., out]. The gradient reaches `x` and `bias`, and can be taken once, not twice.
    """
    if autocasting(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.compiler.is_compiling():
        product: Tensor = _nf4_times(x, *packed[:4], *packed.shape, packed.block, bias)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        product = _Times.apply(x, bias, *packed)  # type: ignore[no-untyped-call]
    else:
        product = _forward(x, packed, bias)
    return product


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        packed = Packed(*parts)
        ctx.save_for_backward(*packed[:4])
        ctx.shape, ctx.block = packed.shape, packed.block
        return _forward(x, packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        codes, absmax, nested, offset = ctx.saved_tensors
        packed = Packed(codes, absmax, nested, offset, ctx.shape, ctx.block)
        x_wants, bias_wants, *_ = ctx.needs_input_grad
        gx = _backward(gy, packed) if x_wants else None
        return gx, gy.reshape(-1, gy.shape[-1]).sum(0) if bias_wants else None, *[None] * 6


def _forward(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """[..., out]: some columns of the product from each tile of rows of the weight."""
    height, width = packed.shape
    flat = x.reshape(-1, width)
    y = flat.new_empty((flat.shape[0], height))
    with without_autocast(x.device):
        step = max(1, TILE // max(1, width))
        tile = y.new_empty((min(step, height), width))
        for top in range(0, height, step):
            bottom = min(height, top + step)
            W = _fill(packed, (top, bottom), (0, width), tile[: bottom - top])
            if bias is None:
                torch.mm(flat, W.t(), out=y[:, top:bottom])
            else:
                torch.addmm(bias[top:bottom], flat, W.t(), out=y[:, top:bottom])
    return y.view(*x.shape[:-1], height)


def _backward(gy: Tensor, packed: Packed) -> Tensor:
    """[..., inp]: some columns of the gradient from each tile of columns of the weight, so that each is summed once."""
    height, width = packed.shape
    flat = gy.reshape(-1, height)
    gx = flat.new_empty((flat.shape[0], width))
    with without_autocast(gy.device):
        step = max(1, TILE // max(1, height) // packed.block) * packed.block
        tile = gx.new_empty(height * min(step, width))
        for left in range(0, width, step):
            right = min(width, left + step)
            part = tile[: height * (right - left)].view(height, right - left)
            torch.mm(flat, _fill(packed, (0, height), (left, right), part), out=gx[:, left:right])
    return gx.view(*gy.shape[:-1], width)


def _fill(packed: Packed, rows: tuple[int, int], columns: tuple[int, int], out: Tensor) -> Tensor:
    return out if shapes_only(out, packed.codes) else region(packed, rows, columns, out)


# --- for the compiler: operators that it need not look into -----------------------------------------------------------

_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int out, int inp, int block"


@torch.library.custom_op("lorary::nf4_times", mutates_args=(), schema=f"(Tensor x, {_PARTS}, Tensor? bias) -> Tensor")
def _nf4_times(x: Tensor, *parts: Any) -> Tensor:
    return _forward(x, _packed(*parts[:7]), parts[7])


@torch.library.custom_op("lorary::nf4_times_backward", mutates_args=(), schema=f"(Tensor gy, {_PARTS}) -> Tensor")
def _nf4_times_backward(gy: Tensor, *parts: Any) -> Tensor:
    return _backward(gy, _packed(*parts))


def _packed(codes: Tensor, absmax: Tensor, nested: Any, offset: Any, height: int, width: int, block: int) -> Packed:
    return Packed(codes, absmax, nested, offset, (height, width), block)


@_nf4_times.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[4]))


@_nf4_times_backward.register_fake
def _(gy: Tensor, *parts: Any) -> Tensor:
    return gy.new_empty((*gy.shape[:-1], parts[5]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.shape, ctx.bias_wants = inputs[5:8], inputs[8] is not None and ctx.needs_input_grad[8]


def _gradient(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    gx = _nf4_times_backward(gy, *ctx.saved_tensors, *ctx.shape) if ctx.needs_input_grad[0] else None
    return gx, *[None] * 7, gy.reshape(-1, gy.shape[-1]).sum(0) if ctx.bias_wants else None


_nf4_times.register_autograd(_gradient, setup_context=_setup)
