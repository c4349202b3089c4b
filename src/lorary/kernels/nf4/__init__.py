"""NF4 weights: quantise, dequantise, and multiply without materialising the dense weight.

`reference` defines the format, `tiles` the products, `cpu` the compiled code, `triton` the GPU kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import autocasting
from lorary.kernels.nf4 import custom_ops, reference
from lorary.kernels.nf4.cpu import native
from lorary.kernels.nf4.reference import CODE, DYNAMIC, QuantizedTensor, matrix_shape, quantize_piece
from lorary.kernels.nf4.tiles import dequantize_into, gather_rows, gradient, product
from lorary.kernels.once_differentiable import once_differentiable

__all__ = ["CODE", "DYNAMIC", "QuantizedTensor", "backend", "dequantize", "dequantize_rows", "linear", "quantize"]


def backend() -> str:
    """The code that dequantises on the CPU: `compiled, AVX-512`, `..., AVX2` or `..., plain C`, else `table`."""
    compiled = native()
    return "table" if compiled is None else f"compiled, {compiled.isa}"


def quantize(W: Tensor, block: int = 64, double: bool = True) -> QuantizedTensor:
    """The NF4 form of a weight, quantised some rows at a time: no copy of the whole weight is made.

    Args:
        W: a weight of any shape, strides and floating dtype.
        block: numbers that share a magnitude, a power of two from 2.
        double: quantise the magnitudes to 8 bits as well: 4.127 bits a number in all instead of 4.5.

    Raises:
        ValueError: if a number is infinite or NaN or outside float32's range, or `block` is not a power of two.

    Example:
        >>> quantize(torch.randn(8, 64)).codes.shape
        torch.Size([256, 1])
    """
    compiled = native() if W.device.type == "cpu" else None
    return reference.quantize(W, block, double, quantize_piece if compiled is None else compiled.quantize_piece)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The dense weight: value times magnitude in float32, rounded once to `dtype`.

    Args:
        quantized: the weight.
        dtype: of the result.
        out: contiguous, of the weight's shape and of `dtype`: receives the numbers, if given.

    Returns:
        [*shape] `out`, or a new tensor on the weight's device.

    Raises:
        ValueError: if `out` has another shape, dtype or device, or is not contiguous.

    Example:
        >>> dequantize(quantize(torch.eye(2))).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if out is None and torch.compiler.is_compiling():
        dense: Tensor = custom_ops.dequantize(*quantized, dtype)
        return dense
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    expected, found = (tuple(quantized.shape), dtype, quantized.codes.device), (tuple(out.shape), out.dtype, out.device)
    if expected != found or not out.is_contiguous():
        raise ValueError(f"`out` has shape, dtype and device {found}; it has to be contiguous and {expected}")
    dequantize_into(quantized, out.detach().view(matrix_shape(quantized.shape)))
    return out


def dequantize_rows(quantized: QuantizedTensor, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Selected rows of a quantised matrix, as in an embedding lookup.

    Args:
        quantized: [height, width] the matrix.
        rows: [...] integers in [0, height).
        dtype: of the result.

    Returns:
        [..., width]

    Raises:
        TypeError: if `rows` are not integers.
        IndexError: on the CPU, if a row is out of range.
    """
    if rows.dtype is torch.bool or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows are of {rows.dtype}; they have to be integers")
    if torch.compiler.is_compiling():
        dense: Tensor = custom_ops.dequantize_rows(*quantized, rows, dtype)
        return dense
    return gather_rows(quantized, rows, dtype)


def linear(x: Tensor, quantized: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`x·Wᵀ + b` with a quantised, frozen W, in x's dtype or autocast's.

    Args:
        x: [..., inp] floating numbers.
        quantized: [out, inp] the weight.
        bias: [out] or None.

    Returns:
        [..., out]. Differentiable once in `x` and `bias`, not twice.

    Raises:
        TypeError: if `x` is not of floating numbers of 16 bits or more.
        ValueError: if the last dimension of `x` is not `inp`, the bias is not [out], or W is not a matrix.

    Example:
        >>> y = linear(x, quantize(W))  # x·W'ᵀ for W' = dequantize(quantize(W)), which is never materialised
    """
    shape = quantized.shape
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(f"x is of {x.dtype}; it has to be of floating numbers of 16 bits or more")
    if len(shape) != 2 or tuple(x.shape[-1:]) != (shape[1],):
        raise ValueError(f"x is {list(x.shape)} and the weight {list(shape)}; the last dimensions have to agree")
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ValueError(f"the bias is {list(bias.shape)} and the weight {list(shape)}; a bias is [out]")
    if autocasting(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.compiler.is_compiling():
        y: Tensor = custom_ops.linear(x, *quantized, bias)
    elif torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = _Linear.apply(x, bias, *quantized)  # type: ignore[no-untyped-call]
    else:
        y = product(x, quantized, bias)
    return y


class _Linear(torch.autograd.Function):
    """`linear` outside `torch.compile`, where a custom operator would take longer to call and hide its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts[:4])
        ctx.shape, ctx.block = parts[4:]
        return product(x, QuantizedTensor(*parts), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x_wants, bias_wants, *_ = ctx.needs_input_grad
        codes, absmax, nested, offset = ctx.saved_tensors
        weight = QuantizedTensor(codes, absmax, nested, offset, ctx.shape, ctx.block)
        gx = gradient(gy, weight) if x_wants else None
        return gx, gy.sum_to_size(gy.shape[-1]) if bias_wants else None, *[None] * 6
