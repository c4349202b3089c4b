"""Row norms of `W + s·B·A` without materialising it, and scaling of output rows (DoRA).

`‖W + sBA‖² = ‖W‖² + 2s·rowsum((W·Aᵀ)⊙B) + s²·rowsum((B·(A·Aᵀ))⊙B)`, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import KEEPS_MORE, is_small, may_overwrite, needs_plain_operations, without_autocast
from lorary.kernels.once_differentiable import once_differentiable

_CHUNK = 2**22  # numbers of a 16-bit W that are converted to 32 bits at a time
_DENSE_UP_TO = 2**13  # numbers of a weight up to which W + s·B·A is formed: fewer operations, hardly any memory


def square_norms(W: Tensor) -> Tensor:
    """The squared norm of every row of W [out, inp], in fp32 (fp64 for a W in fp64): [out]."""
    exact = torch.promote_types(W.dtype, torch.float32)
    pieces = [torch.linalg.vector_norm(rows.to(exact), dim=1).square() for rows in _chunks(W)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def row_norms(W: Tensor, B: Tensor, A: Tensor, s: float, times: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The row norms ‖W + s·B·A‖ [out], at least the square root of the smallest float; differentiable in A and B.

    Args:
        W: [out, inp] the weight, in any precision, or [E, out, inp].
        B: [out, R], A: [R, inp] the factors, with a leading E as W.
        s: their scale.
        times: A -> W·Aᵀ [out, R] in A's precision, if the layer has a faster product than the dense one.

    Returns:
        [out] in fp32, or fp64 for a W in fp64.
    """
    if W.dim() == 3:  # the matrices of experts
        return torch.stack([row_norms(*one, s) for one in zip(W, B, A, strict=True)])
    exact = torch.promote_types(W.dtype, torch.float32)
    smallest = torch.finfo(exact).tiny
    with without_autocast(W.device):
        A, B = A.to(exact), B.to(exact)
        if W.numel() <= _DENSE_UP_TO:
            V = torch.addmm(W.to(exact), B, A, alpha=s)
            norms: Tensor = torch.linalg.vector_norm(V, dim=1)
            return norms.clamp_min(smallest**0.5)
        WA = linear(W, A) if times is None else times(A)
        # B is factored out of both terms: rowsum((2s·W·Aᵀ + s²·B·(A·Aᵀ))⊙B)
        combined = torch.addmm(WA, B, A @ A.T, beta=2 * s, alpha=s * s)
        return (square_norms(W) + (combined * B).sum(1)).clamp_min(smallest).sqrt()


def linear(W: Tensor, A: Tensor) -> Tensor:
    """W·Aᵀ [out, R] of a frozen W [out, inp] of any precision, in A's [R, inp]; differentiable in A."""
    with without_autocast(W.device):
        traced = needs_plain_operations() or not (torch.is_grad_enabled() and A.requires_grad)
        function: Any = _product if traced else _Linear.apply
        WA: Tensor = function(W, A)
        return WA


def _product(W: Tensor, A: Tensor) -> Tensor:
    pieces = [rows.to(A.dtype) @ A.T for rows in _chunks(W)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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
    if needs_plain_operations():
        return scale_rows_reference(v, gain, bias)
    if v.dtype is not gain.dtype and is_small(v, KEEPS_MORE):
        return scale_rows_reference(v, gain, bias)
    if v.dtype is gain.dtype and is_small(v):
        shift = None if bias is None else torch.addcmul(bias, bias, gain, value=-1)
        return v * gain if shift is None else torch.addcmul(shift, v, gain)
    if not torch.is_grad_enabled():
        return _scaled(v, gain, bias)
    out: Tensor = _ScaleRows.apply(v, gain, bias)  # type: ignore[no-untyped-call]
    return out


def scale_rows_reference(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification of `scale_rows` in plain operations."""
    exact = v.to(torch.promote_types(v.dtype, gain.dtype))
    return (exact * gain if bias is None else (exact - bias) * gain + bias).to(v.dtype)


def _scaled(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    # the gain keeps its own precision: near 1, rounding to 16 bits would lose most of what was learned
    out = v.detach() if bias is None and may_overwrite(v, gain) else torch.empty_like(v)
    torch.mul(v, gain, out=out)
    return out if bias is None else out.add_(bias - gain * bias)


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        out = _scaled(v, gain, bias)
        if bias is None:
            ctx.save_for_backward(out, gain)
        else:
            ctx.save_for_backward(v, gain, bias)
        return out

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
