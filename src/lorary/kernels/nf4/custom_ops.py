"""NF4 operators for `torch.compile`: opaque to the compiler, with the shapes and gradients that it needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorary.kernels.nf4.reference import QuantizedTensor, matrix_shape
from lorary.kernels.nf4.tiles import dequantize_into, gather_rows, gradient, product

_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int[] shape, int block"


def _weight(codes: Tensor, absmax: Tensor, nested: Any, offset: Any, shape: Any, block: int) -> QuantizedTensor:
    return QuantizedTensor(codes, absmax, nested, offset, tuple(shape), block)


@torch.library.custom_op("lorary::nf4_linear", mutates_args=(), schema=f"(Tensor x, {_PARTS}, Tensor? bias) -> Tensor")
def linear(x: Tensor, *parts: Any) -> Tensor:
    """x·Wᵀ + b."""
    return product(x, _weight(*parts[:6]), parts[6])


@torch.library.custom_op("lorary::nf4_linear_backward", mutates_args=(), schema=f"(Tensor gy, {_PARTS}) -> Tensor")
def linear_backward(gy: Tensor, *parts: Any) -> Tensor:
    """gy·W."""
    return gradient(gy, _weight(*parts))


@torch.library.custom_op("lorary::nf4_dequantize", mutates_args=(), schema=f"({_PARTS}, ScalarType dtype) -> Tensor")
def dequantize(*parts: Any) -> Tensor:
    """W."""
    weight = _weight(*parts[:6])
    out = torch.empty(weight.shape, dtype=parts[6], device=weight.codes.device)
    dequantize_into(weight, out.view(matrix_shape(weight.shape)))
    return out


@torch.library.custom_op(
    "lorary::nf4_dequantize_rows", mutates_args=(), schema=f"({_PARTS}, Tensor rows, ScalarType dtype) -> Tensor"
)
def dequantize_rows(*parts: Any) -> Tensor:
    """Selected rows of W."""
    return gather_rows(_weight(*parts[:6]), *parts[6:])


@linear.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[4][0]))


@linear_backward.register_fake
def _(gy: Tensor, *parts: Any) -> Tensor:
    return gy.new_empty((*gy.shape[:-1], parts[4][1]))


@dequantize.register_fake
def _(codes: Tensor, *parts: Any) -> Tensor:
    return codes.new_empty(parts[3], dtype=parts[5])


@dequantize_rows.register_fake
def _(codes: Tensor, *parts: Any) -> Tensor:
    return codes.new_empty((*parts[5].shape, parts[3][-1]), dtype=parts[6])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.shape, ctx.block = inputs[5:7]


def _gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x_wants, bias_wants = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    gx = linear_backward(gy, *ctx.saved_tensors, ctx.shape, ctx.block) if x_wants else None
    return gx, *[None] * 6, gy.sum_to_size(gy.shape[-1]) if bias_wants else None


linear.register_autograd(_gradients, setup_context=_setup)
