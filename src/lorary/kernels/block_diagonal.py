"""MELoRA's update `y + s · drop(x)·blockdiag(A)ᵀ·blockdiag(B)ᵀ` as batched products of the blocks.

n blocks of rank r cost as much as one pair of rank r, a factor n less than the equivalent dense pair of rank n·r.
Backward keeps `x` itself, the product with A [n, T, r] and the masters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import (
    add_low_rank_reference,
    dropout_and_seed,
    dropped_rows,
    is_small,
    kept_mask,
    may_overwrite,
    needs_plain_operations,
    without_autocast,
)
from lorary.kernels.once_differentiable import once_differentiable


def add_blocks(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float = 0.0) -> Tensor:
    """A layer's output plus `s · B_i·A_i·drop(x)_i` in its i-th slice, computed in the output's dtype.

    Args:
        y: [..., out] the frozen layer's output, which may be overwritten as in `add_low_rank`.
        x: [..., in] the layer's input; n divides in and out.
        A: [n, r, in/n] first factors.
        B: [n, out/n, r] second factors.
        s: scale of the product.
        dropout: probability in [0, 1) of dropping an element of `x`, as in `add_low_rank`.

    Returns:
        [..., out] the sum, in `y`'s dtype. The input is kept for backward only where `A` trains.
    """
    if needs_plain_operations():
        return add_low_rank_reference(y, x, torch.block_diag(*A), torch.block_diag(*B), s, dropout)
    if not dropout and y.dtype is x.dtype is A.dtype is B.dtype and is_small(y):
        n = A.shape[0]
        z = torch.bmm(_slices(_rows(x), n), A.mT)  # [n, T, r]
        if z.dtype is y.dtype:  # not under autocast
            return _side_by_side(torch.baddbmm(_slices(_rows(y), n), z, B.mT, alpha=s), y.shape)
    dropout, seed = dropout_and_seed(dropout)
    if not torch.is_grad_enabled():
        return _add(y, x, A, B, s, dropout, seed)[0]
    fused: Tensor = _AddBlocks.apply(y, x, A, B, s, dropout, seed)  # type: ignore[no-untyped-call]
    return fused


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float, seed: int | None
) -> tuple[Tensor, Tensor, float]:
    """(the sum, z, the scale of z·Bᵀ), without a graph."""
    dtype, n = y.dtype, A.shape[0]
    with without_autocast(y.device):
        rows = dropped_rows(x, dtype, dropout, seed)
        z = torch.bmm(_slices(rows, n), A.to(dtype).mT)  # [n, T, r]
        scale = s / (1.0 - dropout)
        total = y.detach() if may_overwrite(y, x) else y.clone(memory_format=torch.contiguous_format)
        flat = total.view(-1, y.shape[-1])
        # n is small, and each product is accumulated in place
        for part, z_i, B_i in zip(flat.chunk(n, 1), z, B.to(dtype), strict=True):
            part.addmm_(z_i, B_i.t(), alpha=scale)
    return total, z, scale


class _AddBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float, seed: int | None
    ) -> Tensor:
        total, z, scale = _add(y, x, A, B, s, dropout, seed)
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if a_wants else None, z if b_wants else None, A if x_wants else None, B if x_wants or a_wants else None
        )
        ctx.x_shape, ctx.n, ctx.scale, ctx.dropout, ctx.seed = x.shape, A.shape[0], scale, dropout, seed
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        dtype, n, width = gy.dtype, ctx.n, ctx.x_shape[-1]
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        gx = gA = gB = None
        with without_autocast(gy.device):
            g = _slices(gy.reshape(-1, gy.shape[-1]), n)  # [n, T, out/n]
            mask = None
            if ctx.seed is not None and (x_wants or a_wants):
                mask = kept_mask((g.shape[1], width), gy, ctx.dropout, ctx.seed)
            if b_wants:
                gB = torch.bmm(g.mT, z).mul_(ctx.scale)  # [n, out/n, r]
            if x_wants or a_wants:
                gz = torch.bmm(g, B.to(dtype)).mul_(ctx.scale)  # [n, T, r]
            if x_wants:
                gx = gy.new_empty(g.shape[1], width)
                for part, gz_i, A_i in zip(gx.chunk(n, 1), gz, A.to(dtype), strict=True):
                    part.copy_(gz_i @ A_i)
                gx = (gx if mask is None else gx.mul_(mask)).view(ctx.x_shape)
            if a_wants:
                rows = x.reshape(-1, width).to(dtype)
                rows = rows if mask is None else mask.mul_(rows)
                gA = torch.bmm(gz.mT, _slices(rows, n))  # [n, r, in/n]
        return gy, gx, gA, gB, None, None, None


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [T, width]; a view that changes nothing would be a node of the graph."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _slices(rows: Tensor, n: int) -> Tensor:
    """[T, width] as n slices side by side: [n, T, width/n], a view."""
    if rows.shape[0] == 1:  # decoding: one view less
        return rows.view(n, 1, rows.shape[1] // n)
    return rows.view(rows.shape[0], n, rows.shape[1] // n).transpose(0, 1)  # -1 is ambiguous for no rows


def _side_by_side(slices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[n, T, width/n] as [..., width] of this shape: the inverse of `_slices`."""
    return (slices if slices.shape[1] == 1 else slices.transpose(0, 1)).reshape(shape)
