"""What a magnitude per output row needs: the row norms of `W + s·B·A` without that matrix, and the gain they give.

`‖W + sBA‖² = ‖W‖² + 2s·rowsum((W·Aᵀ)⊙B) + s²·rowsum((B·(A·Aᵀ))⊙B)`, row by row: no matrix of W's size is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorary.kernels.low_rank import may_overwrite, without_autocast

_CHUNK = 2**22  # numbers of W that are in 32 bits at a time, where it is kept in fewer


def square_norms(W: Tensor) -> Tensor:
    """The squared norm of every row of W [out, inp], in fp32 (fp64 for a W in fp64): [out]."""
    exact = torch.promote_types(W.dtype, torch.float32)
    return torch.cat([rows.to(exact).square().sum(1) for rows in _chunks(W)])


def row_norms(WA: Tensor, square: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """‖W + s·B·A‖ of every row, where it is not zero: [out], differentiable in A and B.

    Args:
        WA: [out, R] W·Aᵀ, in square's precision.
        square: [out] the squared row norms of W, from `square_norms`.
        B: [out, R], A: [R, inp] the factors.
        s: their scale.
    """
    with without_autocast(WA.device):
        exact = square.dtype
        A, B = A.to(exact), B.to(exact)
        # both terms have B on their right: rowsum((2s·W·Aᵀ + s²·B·(A·Aᵀ))⊙B)
        bent = torch.addmm(WA, B, A @ A.T, beta=2 * s, alpha=s * s)
        squared = square + (bent * B).sum(1)
        return squared.clamp_min(torch.finfo(exact).tiny).sqrt()


def linear(W: Tensor, A: Tensor) -> Tensor:
    """W·Aᵀ [out, R] of a frozen W [out, inp] of any precision, in A's [R, inp]; differentiable in A."""
    with without_autocast(W.device):
        product: Any = _times if torch.compiler.is_compiling() else _Times.apply
        WA: Tensor = product(W, A)
        return WA


def _times(W: Tensor, A: Tensor) -> Tensor:
    return torch.cat([rows.to(A.dtype) @ A.T for rows in _chunks(W)])


class _Times(torch.autograd.Function):
    """W·Aᵀ in A's precision for a frozen W, which is kept as it is stored: autograd would keep it in 32 bits."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return _times(W, A)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        (W,) = ctx.saved_tensors
        pieces = _chunks(W)
        gA = [of.T @ rows.to(g.dtype) for of, rows in zip(g.split([len(p) for p in pieces]), pieces, strict=True)]
        return None, torch.stack(gA).sum(0)


def _chunks(W: Tensor) -> tuple[Tensor, ...]:
    whole = torch.promote_types(W.dtype, torch.float32) == W.dtype
    return (W,) if whole else W.split(max(1, _CHUNK // W.shape[1]))


def scale_rows(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gain·(v - bias) + bias`: an output whose bias is no part of what is scaled.

    Args:
        v: [N..., out, *] an output, given up by the caller as for `add_low_rank`.
        gain: [out, *] shaped to broadcast over it, in any precision.
        bias: likewise, or None.

    Returns:
        the same shape and dtype. One tensor of this size is kept for backward, and without a bias it is the result
        itself, which whoever comes next often keeps as well.
    """
    if torch.compiler.is_compiling():
        return scale_rows_reference(v, gain, bias)
    out: Tensor = _Gained.apply(v, gain, bias)  # type: ignore[no-untyped-call]
    return out


def scale_rows_reference(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as plain operations."""
    exact = v.to(torch.promote_types(v.dtype, gain.dtype))
    return (exact * gain if bias is None else (exact - bias) * gain + bias).to(v.dtype)


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        # the gain stays in its own precision: near 1, 16 bits would round most of what it has learnt away
        out = v.detach() if bias is None and may_overwrite(v, gain) else torch.empty_like(v)
        torch.mul(v, gain, out=out)
        if bias is None:
            ctx.save_for_backward(out, gain)
            return out
        ctx.save_for_backward(v, gain, bias)
        return out.add_(bias - gain * bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        v, gain, *rest = ctx.saved_tensors
        _, gain_wants, bias_wants = ctx.needs_input_grad
        gv, ggain, gbias = torch.mul(gy, gain, out=torch.empty_like(gy)), None, None
        if gain_wants:
            # without a bias what was kept is gain·v; a gain of 0 has forgotten v, and then v is W x of a row of zeros
            along = _over_rows(gy * v, gain)
            ggain = along - _over_rows(gy, gain) * rest[0] if rest else torch.where(gain == 0, 0.0, along / gain)
        if bias_wants:
            gbias = _over_rows(gy - gv, rest[0])
        return gv, ggain, gbias


def _over_rows(each: Tensor, like: Tensor) -> Tensor:
    """The sum over whatever `like` was broadcast over, in `like`'s precision."""
    extra = each.dim() - like.dim()
    dims = [*range(extra), *(extra + i for i, n in enumerate(like.shape) if n == 1 and each.shape[extra + i] != 1)]
    return each.sum(dims, dtype=like.dtype, keepdim=False).view(like.shape) if dims else each.to(like.dtype)
