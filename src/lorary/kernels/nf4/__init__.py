"""4-bit weights: packed, unpacked, and multiplied with, without the dense weight ever being there as a whole.

What the bytes mean is in `nf4_values`; how a product is taken, in `nf4_tiles`; the compiled code, in `nf4_native`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorary.kernels.low_rank import autocasting
from lorary.kernels.nf4 import custom_ops, reference
from lorary.kernels.nf4.cpu import native
from lorary.kernels.nf4.reference import CODE, DYNAMIC, QuantizedTensor, matrix_shape, quantize_piece
from lorary.kernels.nf4.tiles import dequantize_into, gradient, product, some_rows

__all__ = ["CODE", "DYNAMIC", "QuantizedTensor", "backend", "dequantize", "dequantize_rows", "linear", "quantize"]


def backend() -> str:
    """How packed weights are read on the CPU: `compiled, AVX-512`, `..., AVX2` or `..., plain C`, else `table`."""
    compiled = native()
    return "table" if compiled is None else f"compiled, {compiled.isa}"


def quantize(W: Tensor, block: int = 64, double: bool = True) -> QuantizedTensor:
    """Packs a weight to 4 bits a number, some rows at a time: no copy of it is made in any precision.

    Args:
        W: a weight of any shape, strides and floating dtype.
        block: numbers that share a magnitude, a power of two from 2.
        double: whether to keep the magnitudes as bytes too: 4.127 bits a number in all instead of 4.5.

    Raises:
        ValueError: if a number is infinite or NaN or outside float32's range, or `block` is not a power of two.

    Example:
        >>> pack(torch.randn(8, 64)).codes.shape
        torch.Size([256, 1])
    """
    compiled = native() if W.device.type == "cpu" else None
    return reference.quantize(W, block, double, quantize_piece if compiled is None else compiled.pack_piece)


def dequantize(packed: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The numbers of a packed weight: value times magnitude in float32, rounded once to `dtype`.

    Args:
        packed: the weight.
        dtype: of the result.
        out: contiguous, of the weight's shape and of `dtype`: where the numbers are written, if given.

    Returns:
        [*shape] `out`, or a new tensor on the weight's device.

    Raises:
        ValueError: if `out` has another shape, dtype or device, or is not contiguous.

    Example:
        >>> unpack(pack(torch.eye(2))).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if out is None and torch.compiler.is_compiling():
        made: Tensor = custom_ops.dequantize(*packed, dtype)
        return made
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    wanted, given = (tuple(packed.shape), dtype, packed.codes.device), (tuple(out.shape), out.dtype, out.device)
    if wanted != given or not out.is_contiguous():
        raise ValueError(f"`out` has shape, dtype and device {given}; it has to be contiguous and {wanted}")
    dequantize_into(packed, out.detach().view(matrix_shape(packed.shape)))
    return out


def dequantize_rows(packed: QuantizedTensor, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some rows of a packed matrix, as an embedding takes them.

    Args:
        packed: [height, width] the matrix.
        rows: [...] whole numbers in [0, height).
        dtype: of the result.

    Returns:
        [..., width]

    Raises:
        TypeError: if `rows` are no whole numbers.
        IndexError: on the CPU, if there is no such row.
    """
    if rows.dtype is torch.bool or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows are of {rows.dtype}; they have to be whole numbers")
    if torch.compiler.is_compiling():
        made: Tensor = custom_ops.dequantize_rows(*packed, rows, dtype)
        return made
    return some_rows(packed, rows, dtype)


def linear(x: Tensor, packed: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`x·Wᵀ + b` with a packed W in x's dtype, or in autocast's, as a frozen linear layer computes it.

    Args:
        x: [..., inp] floating numbers.
        packed: [out, inp] the weight.
        bias: [out] or None.

    Returns:
        [..., out]. The gradient reaches `x` and `bias`, and can be taken once, not twice.

    Raises:
        TypeError: if `x` is not of floating numbers of 16 bits or more.
        ValueError: if the last dimension of `x` is not `inp`, the bias is not [out], or W is not a matrix.

    Example:
        >>> y = times(x, pack(W))  # x·W', where W' = unpack(pack(W)) is never there as a whole
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(f"x is of {x.dtype}; it has to be of floating numbers of 16 bits or more")
    if len(packed.shape) != 2 or tuple(x.shape[-1:]) != (packed.shape[1],):
        raise ValueError(f"x is {list(x.shape)} and the weight {list(packed.shape)}; the last dimensions have to agree")
    if bias is not None and tuple(bias.shape) != (packed.shape[0],):
        raise ValueError(f"the bias is {list(bias.shape)} and the weight {list(packed.shape)}; a bias is [out]")
    if autocasting(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.compiler.is_compiling():
        made: Tensor = custom_ops.linear(x, *packed, bias)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        made = _Times.apply(x, bias, *packed)  # type: ignore[no-untyped-call]
    else:
        made = product(x, packed, bias)
    return made


class _Times(torch.autograd.Function):
    """Outside of the compiler: an operator of our own would take longer to call, and hide what it makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts[:4])
        ctx.shape, ctx.block = parts[4:]
        return product(x, custom_ops.quantized_tensor_of(*parts), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x_wants, bias_wants, *_ = ctx.needs_input_grad
        gx = (
            gradient(gy, custom_ops.quantized_tensor_of(*[*ctx.saved_tensors, ctx.shape, ctx.block]))
            if x_wants
            else None
        )
        return gx, gy.sum_to_size(gy.shape[-1]) if bias_wants else None, *[None] * 6
