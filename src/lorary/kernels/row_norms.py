"""Row norms of `W + s·B·A` without materialising it, and scaling of output rows (DoRA).

`‖W + sBA‖² = ‖W‖² + 2s·rowsum((W·Aᵀ)⊙B) + s²·rowsum((B·(A·Aᵀ))⊙B)`, row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorary.kernels.low_rank import may_overwrite, without_autocast

_CHUNK = 2**22  # numbers of a 16-bit W that are converted to 32 bits at a time


def square_norms(W: Tensor) -> Tensor:
    """The squared norm of every row of W [out, inp], in fp32 (fp64 for a W in fp64): [out]."""
    exact = torch.promote_types(W.dtype, torch.float32)
    return torch.cat([rows.to(exact).square().sum(1) for rows in _chunks(W)])


def row_norms(WA: Tensor, square: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """The row norms ‖W + s·B·A‖ [out], at least the square root of the smallest float; differentiable in A and B.

    Args:
        WA: [out, R] W·Aᵀ, in square's precision.
        square: [out] the squared row norms of W, from `square_norms`.
        B: [out, R], A: [R, inp] the factors.
        s: their scale.
    """
    with without_autocast(WA.device):
        exact = square.dtype
        A, B = A.to(exact), B.to(exact)
        # B is factored out of both terms: rowsum((2s·W·Aᵀ + s²·B·(A·Aᵀ))⊙B)
        combined = torch.addmm(WA, B, A @ A.T, beta=2 * s, alpha=s * s)
        squared = square + (combined * B).sum(1)
        return squared.clamp_min(torch.finfo(exact).tiny).sqrt()


def linear(W: Tensor, A: Tensor) -> Tensor:
    """W·Aᵀ [out, R] of a frozen W [out, inp] of any precision, in A's [R, inp]; differentiable in A."""
    with without_autocast(W.device):
        function: Any = _product if torch.compiler.is_compiling() else _Linear.apply
        WA: Tensor = function(W, A)
        return WA


def _product(W: Tensor, A: Tensor) -> Tensor:
    return torch.cat([rows.to(A.dtype) @ A.T for rows in _chunks(W)])


class _Linear(torch.autograd.Function):
    """W·Aᵀ in A's precision for a frozen W; saves W as it is stored, where autograd would save a 32-bit copy."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return _product(W, A)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        (W,) = ctx.saved_tensors
        pieces = _chunks(W)
        gA = [of.T @ rows.to(g.dtype) for of, rows in zip(g.split([len(p) for p in pieces]), pieces, strict=True)]
        return None, torch.stack(gA).sum(0)


def _chunks(W: Tensor) -> tuple[Tensor, ...]:
    unchunked = torch.promote_types(W.dtype, torch.float32) == W.dtype
    return (W,) if unchunked else W.split(max(1, _CHUNK // W.shape[1]))


def scale_rows(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gain·(v - bias) + bias`: an output scaled without its bias.

    Args:
        v: [N..., out, *] an output that may be overwritten, as in `add_low_rank`.
        gain: [out, *] shaped to broadcast over it, in any precision.
        bias: likewise, or None.

    Returns:
        the same shape and dtype. Backward keeps one tensor of this size; without a bias it is the result itself, which
        the next operation often keeps anyway.
    """
    if torch.compiler.is_compiling():
        return scale_rows_reference(v, gain, bias)
    out: Tensor = _ScaleRows.apply(v, gain, bias)  # type: ignore[no-untyped-call]
    return out


def scale_rows_reference(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification of `scale_rows` in plain operations."""
    exact = v.to(torch.promote_types(v.dtype, gain.dtype))
    return (exact * gain if bias is None else (exact - bias) * gain + bias).to(v.dtype)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        # the gain keeps its own precision: near 1, rounding to 16 bits would lose most of what was learned
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
            # without a bias gain·v was saved, which loses v for a gain of 0; then v is zero: the output of a zero row
            product = _sum_to(gy * v, gain)
            ggain = product - _sum_to(gy, gain) * rest[0] if rest else torch.where(gain == 0, 0.0, product / gain)
        if bias_wants:
            gbias = _sum_to(gy - gv, rest[0])
        return gv, ggain, gbias


def _sum_to(each: Tensor, like: Tensor) -> Tensor:
    """The sum over the dimensions that `like` was broadcast over, in `like`'s precision."""
    extra = each.dim() - like.dim()
    dims = [*range(extra), *(extra + i for i, n in enumerate(like.shape) if n == 1 and each.shape[extra + i] != 1)]
    return each.sum(dims, dtype=like.dtype, keepdim=False).view(like.shape) if dims else each.to(like.dtype)
