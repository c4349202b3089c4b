"""LoHa's update `y + s·drop(x)·((B1·A1)⊙(B2·A2))ᵀ`, computed without keeping a matrix of the weight's size.

The product of two matrices of rank r, element by element, has a rank of up to r². From some r on one product with the
whole matrix is cheaper than two through a middle of r². That matrix is formed in forward and again in backward, and
freed at once; backward keeps `x` itself and the four factors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.low_rank import (
    dropout_and_seed,
    dropped_plainly,
    dropped_rows,
    kept_mask,
    may_overwrite,
    needs_plain_operations,
    without_autocast,
)
from lorary.kernels.once_differentiable import once_differentiable


def add_hadamard(
    y: Tensor, x: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, s: float, dropout: float = 0.0
) -> Tensor:
    """A layer's output plus `s·drop(x)·((B1·A1)⊙(B2·A2))ᵀ`, computed in the output's dtype.

    Args:
        y: [..., out] the frozen layer's output, which may be overwritten as in `add_low_rank`.
        x: [..., in] the layer's input.
        B1, B2: [out, r]; A1, A2: [r, in].
        s: scale of the product.
        dropout: probability in [0, 1) of dropping an element of `x`, as in `add_low_rank`.

    Returns:
        [..., out] the sum, in `y`'s dtype.
    """
    if needs_plain_operations():
        return add_hadamard_reference(y, x, B1, A1, B2, A2, s, dropout)
    dropout, seed = dropout_and_seed(dropout)
    if not torch.is_grad_enabled():
        return _add(y, x, (B1, A1, B2, A2), s, dropout, seed)
    total: Tensor = _AddHadamard.apply(y, x, s, dropout, seed, B1, A1, B2, A2)  # type: ignore[no-untyped-call]
    return total


def add_hadamard_reference(
    y: Tensor, x: Tensor, B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, s: float, dropout: float = 0.0
) -> Tensor:
    """The specification of `add_hadamard` in plain operations."""
    with without_autocast(y.device):
        return y + s * F.linear(dropped_plainly(x, y.dtype, dropout), ((B1 @ A1) * (B2 @ A2)).to(y.dtype))


def _add(y: Tensor, x: Tensor, factors: tuple[Tensor, ...], s: float, dropout: float, seed: int | None) -> Tensor:
    B1, A1, B2, A2 = factors
    with without_autocast(y.device):
        M = (B1 @ A1).mul_(B2 @ A2).to(y.dtype)
        rows = dropped_rows(x, y.dtype, dropout, seed)
        total = y.detach() if may_overwrite(y, x) else y.clone(memory_format=torch.contiguous_format)
        total.view(-1, M.shape[0]).addmm_(rows, M.t(), alpha=s / (1.0 - dropout))
    return total


class _AddHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, s: float, dropout: float, seed: int | None, *factors: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[5:]
        ctx.save_for_backward(x if any(wanted) else None, *factors)
        ctx.x_shape, ctx.scale, ctx.dropout, ctx.seed = x.shape, s / (1.0 - dropout), dropout, seed
        return _add(y, x, factors, s, dropout, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, B1, A1, B2, A2 = ctx.saved_tensors
        dtype, width = gy.dtype, ctx.x_shape[-1]
        x_wants, wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        gx: Tensor | None = None
        found: list[Tensor | None] = [None] * 4
        with without_autocast(gy.device):
            g = gy.reshape(-1, gy.shape[-1])  # [T, out]
            mask = None if ctx.seed is None else kept_mask((g.shape[0], width), g, ctx.dropout, ctx.seed)
            first, second = B1 @ A1, B2 @ A2  # [out, in]
            if x_wants:
                gx = (g @ (first * second).to(dtype)).mul_(ctx.scale)
                gx = (gx if mask is None else gx.mul_(mask)).view(ctx.x_shape)
            if any(wanted):
                rows = x.reshape(-1, width).to(dtype)
                rows = rows if mask is None else mask.mul_(rows)
                gM = (g.t() @ rows).to(first.dtype).mul_(ctx.scale)  # the gradient of the whole matrix
                found = [*_factors(gM * second, B1, A1), *_factors(gM.mul_(first), B2, A2)]
                found = [each if wants else None for each, wants in zip(found, wanted, strict=True)]
        return gy, gx, None, None, None, *found


def _factors(gP: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of B and A from that of their product."""
    return gP @ A.t(), B.t() @ gP
