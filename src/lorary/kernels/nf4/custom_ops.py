"""The same for `torch.compile`: operators that it need not look into, with the shapes and gradients it asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorary.kernels.nf4.reference import QuantizedTensor, matrix_shape
from lorary.kernels.nf4.tiles import dequantize_into, gradient, product, some_rows

_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int[] shape, int block"


@torch.library.custom_op("lorary::nf4_times", mutates_args=(), schema=f"(Tensor x, {_PARTS}, Tensor? bias) -> Tensor")
def linear(x: Tensor, *parts: Any) -> Tensor:
    """x·Wᵀ + b."""
    return product(x, quantized_tensor_of(*parts[:6]), parts[6])


@torch.library.custom_op("lorary::nf4_times_backward", mutates_args=(), schema=f"(Tensor gy, {_PARTS}) -> Tensor")
def linear_backward(gy: Tensor, *parts: Any) -> Tensor:
    """gy·W."""
    return gradient(gy, quantized_tensor_of(*parts))


@torch.library.custom_op("lorary::nf4_unpack", mutates_args=(), schema=f"({_PARTS}, ScalarType dtype) -> Tensor")
def dequantize(*parts: Any) -> Tensor:
    """W."""
    packed = quantized_tensor_of(*parts[:6])
    out = torch.empty(packed.shape, dtype=parts[6], device=packed.codes.device)
    dequantize_into(packed, out.view(matrix_shape(packed.shape)))
    return out


@torch.library.custom_op(
    "lorary::nf4_unpack_rows", mutates_args=(), schema=f"({_PARTS}, Tensor rows, ScalarType dtype) -> Tensor"
)
def dequantize_rows(*parts: Any) -> Tensor:
    """Some rows of W."""
    return some_rows(quantized_tensor_of(*parts[:6]), *parts[6:])


@linear.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], parts[4][0]))


@linear_backward.register_fake
def _(gy: Tensor, *parts: Any) -> Tensor:
    return gy.new_empty((*gy.shape[:-1], parts[4][1]))


@dequantize.register_fake
def _(*parts: Any) -> Tensor:
    made: Tensor = parts[0].new_empty(parts[4], dtype=parts[6])
    return made


@dequantize_rows.register_fake
def _(*parts: Any) -> Tensor:
    made: Tensor = parts[0].new_empty((*parts[6].shape, parts[4][-1]), dtype=parts[7])
    return made


def quantized_tensor_of(
    codes: Tensor, absmax: Tensor, nested: Any, offset: Any, shape: Any, block: int
) -> QuantizedTensor:
    """The parts of a packed weight as one."""
    return QuantizedTensor(codes, absmax, nested, offset, tuple(shape), block)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5])
    ctx.shape, ctx.block = inputs[5:7]


def _gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x_wants, bias_wants = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    gx = linear_backward(gy, *ctx.saved_tensors, ctx.shape, ctx.block) if x_wants else None
    return gx, *[None] * 6, gy.sum_to_size(gy.shape[-1]) if bias_wants else None


linear.register_autograd(_gradients, setup_context=_setup)
