"""NF4 weights of the experts of a block: each matrix is quantised by itself, so that it can be read alone.

The tensors of the experts' `QuantizedTensor`s are stacked: their first dimension, and that of the shape, is E. Products
read the experts that have rows, one after the other and tile by tile; no dense matrix of all experts is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.grouped import Groups
from lorary.kernels.low_rank import autocasting
from lorary.kernels.nf4 import dequantize, quantize
from lorary.kernels.nf4.reference import QuantizedTensor
from lorary.kernels.nf4.tiles import gradient, product
from lorary.kernels.once_differentiable import once_differentiable


def quantize_experts(matrices: Iterable[Tensor], block: int = 64, double: bool = True) -> QuantizedTensor:
    """The NF4 form of E matrices of one shape [out, in], one at a time.

    Raises:
        ValueError: as `nf4.quantize`.
    """
    each: list[Any] = [quantize(W.contiguous(), block, double) for W in matrices]
    parts: list[Any] = [None if same[0] is None else torch.stack(same) for same in list(zip(*each, strict=True))[:4]]
    return _weight(parts, (len(each), *each[0].shape), block)


def expert(quantized: QuantizedTensor, e: int) -> QuantizedTensor:
    """The matrix of one expert, views."""
    return _weight([None if part is None else part[e] for part in quantized[:4]], quantized.shape[1:], quantized.block)


def dequantize_experts(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[E, out, in] every dense matrix."""
    if torch.compiler.is_compiling():
        return torch.stack([dequantize(expert(quantized, e), dtype) for e in range(quantized.shape[0])])
    dense = torch.empty(quantized.shape, dtype=dtype, device=quantized.codes.device)
    for e, out in enumerate(dense):
        dequantize(expert(quantized, e), dtype, out)
    return dense


def grouped_linear(x: Tensor, quantized: QuantizedTensor, groups: Groups) -> Tensor:
    """[T, out] rows x [T, in], sorted by expert, times their expert's W^T, in x's dtype or autocast's.

    Differentiable once in `x`; backward keeps the codes, and dequantises again.
    """
    if autocasting(x.device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():
        compiled: Tensor = _compiled(x, *quantized, groups.ids)
        return compiled
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupedLinear.apply(x, groups, *quantized)  # type: ignore[no-any-return, no-untyped-call]
    return _products(x, quantized, groups)


def _products(x: Tensor, quantized: QuantizedTensor, groups: Groups) -> Tensor:
    y = x.new_empty(len(x), quantized.shape[1])
    for e, start, end in groups.rows:
        y[start:end] = product(x[start:end], expert(quantized, e), None)
    return y


def _gradients(gy: Tensor, quantized: QuantizedTensor, groups: Groups) -> Tensor:
    """[T, in] of gy [T, out]."""
    gx = gy.new_empty(len(gy), quantized.shape[2])
    for e, start, end in groups.rows:
        gx[start:end] = gradient(gy[start:end], expert(quantized, e))
    return gx


def _weight(tensors: Sequence[Any], shape: Sequence[int], block: int) -> QuantizedTensor:
    codes, absmax, nested, offset = tensors
    return QuantizedTensor(codes, absmax, nested, offset, tuple(shape), block)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, *parts: Any) -> Tensor:
        ctx.save_for_backward(*parts[:4])
        ctx.groups, ctx.shape, ctx.block = groups, *parts[4:]
        return _products(x, QuantizedTensor(*parts), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(gy, _weight(ctx.saved_tensors, ctx.shape, ctx.block), ctx.groups), *[None] * 7


# --- compiled regions: operators that are opaque to the compiler, with the shapes and gradients that it needs ---------

_PARTS = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int[] shape, int block"


@torch.library.custom_op("lorary::nf4_experts", mutates_args=(), schema=f"(Tensor x, {_PARTS}, Tensor ids) -> Tensor")
def _compiled(x: Tensor, *parts: Any) -> Tensor:
    """`grouped_linear` by the expert of each row."""
    quantized, ids = _weight(parts[:4], *parts[4:6]), parts[6]
    return _products(x, quantized, Groups(ids, quantized.shape[0]))


@torch.library.custom_op(
    "lorary::nf4_experts_backward", mutates_args=(), schema=f"(Tensor gy, {_PARTS}, Tensor ids) -> Tensor"
)
def _compiled_backward(gy: Tensor, *parts: Any) -> Tensor:
    """Its gradient for x."""
    quantized, ids = _weight(parts[:4], *parts[4:6]), parts[6]
    return _gradients(gy, quantized, Groups(ids, quantized.shape[0]))


@_compiled.register_fake
def _(x: Tensor, *parts: Any) -> Tensor:
    return x.new_empty(x.shape[0], parts[4][1])


@_compiled_backward.register_fake
def _(gy: Tensor, *parts: Any) -> Tensor:
    return gy.new_empty(gy.shape[0], parts[4][2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:5], inputs[7])
    ctx.shape, ctx.block = inputs[5:7]


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    *parts, ids = ctx.saved_tensors
    gx = _compiled_backward(gy, *parts, ctx.shape, ctx.block, ids) if ctx.needs_input_grad[0] else None
    return gx, *[None] * 7


_compiled.register_autograd(_backward, setup_context=_setup)
