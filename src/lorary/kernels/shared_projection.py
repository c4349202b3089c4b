"""VeRA's update `y + s·b⊙(B·(d⊙(A·drop(x))))`: trained vectors b, d and frozen matrices shared by all layers.

Layers with the same input and the same A (q, k and v; gate and up) share the product with A: it is computed and kept
once, and so is its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lorary.kernels.low_rank import (
    KEEPS_MORE,
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
from lorary.kernels.torch_internals import version_of


class LastProductCache:
    """The last product with A, as long as the backward pass keeps it alive.

    It is reused by the other layers with the same input within one pass only: each layer takes it once, and x has to be
    an activation with a graph, which lasts for one pass; a tensor that a program keeps may be rewritten unnoticed.
    """

    def __init__(self) -> None:
        self._last: tuple[TensorWeakRef, TensorWeakRef, Any, set[int]] | None = None  # x, z, state, takers of z

    def __reduce__(self) -> Any:  # a copy starts empty
        return LastProductCache, ()

    def project(self, x: Tensor, A: Tensor, dtype: torch.dtype, taker: int) -> Tensor:
        """[T, R] x·Aᵀ in this dtype, reused if it was the last product, of the same x and A.

        Args:
            x: [..., in], A: [R, in], dtype: of the product.
            taker: identifies the layer.
        """
        state = (version_of(x), version_of(A), A.data_ptr(), A.shape, dtype)
        last = self._last  # read once, because of other threads
        if last is not None and last[2] == state and last[0]() is x and taker not in last[3]:
            z: Tensor | None = last[1]()
            if z is not None:
                last[3].add(taker)
                return z
        z = _project(x, A, dtype, 0.0)
        self._last = TensorWeakRef(x), TensorWeakRef(z), state, {taker}
        return z


def add_shared_projection(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    b: Tensor,
    d: Tensor,
    s: float,
    dropout: float = 0.0,
    once: LastProductCache | None = None,
) -> Tensor:
    """A layer's output plus `s·b⊙(B·(d⊙(A·drop(x))))`, computed in the output's dtype.

    Args:
        y: [..., out] the frozen layer's output, which may be overwritten as in `add_low_rank`.
        x: [..., in] the layer's input.
        A, B: [R, in] and [out, R], frozen.
        b, d: [out] and [R], trained.
        s: scale of the product.
        dropout: probability in [0, 1) of dropping an element of `x`, as in `add_low_rank`.
        once: the cache that all layers with the same A share.

    Returns:
        [..., out] the sum, in `y`'s dtype. For T rows and rank R, backward keeps the [T, R] product with A; up to
        T = 2 R also B's product with it, then at most twice the size of B; beyond, it computes the gradient of
        diag(b)·B·diag(d) instead.
    """
    if A.requires_grad or B.requires_grad or needs_plain_operations():
        return add_low_rank_reference(y, x, A, b[:, None] * B * d, s, dropout)
    if not dropout and y.dtype is x.dtype is A.dtype is b.dtype and is_small(y, KEEPS_MORE):
        u = F.linear(F.linear(x, A) * d, B)
        if u.dtype is y.dtype:  # not under autocast
            return torch.addcmul(y, u, b, value=s)
    if once is not None and not dropout and torch.is_grad_enabled() and x.grad_fn is not None:
        z = once.project(x, A, y.dtype, id(b))
    else:
        z = _project(x, A, y.dtype, dropout)
    if not torch.is_grad_enabled():
        return _add_vectors(y, z, B, b, d, s, may_overwrite(y, x))[0]
    total: Tensor = _AddVectors.apply(y, z, B, b, d, s, may_overwrite(y, x))  # type: ignore[no-untyped-call]
    return total


def _project(x: Tensor, A: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    dropout, seed = dropout_and_seed(dropout)
    if not torch.is_grad_enabled():
        return _projected(x, A, dtype, dropout, seed)
    z: Tensor = _Project.apply(x, A, dtype, dropout, seed)  # type: ignore[no-untyped-call]
    return z


def _projected(x: Tensor, A: Tensor, dtype: torch.dtype, dropout: float, seed: int | None) -> Tensor:
    with without_autocast(x.device):
        rows = dropped_rows(x, dtype, dropout, seed)
        rows = rows if seed is None else rows.mul_(1.0 / (1.0 - dropout))
        return rows @ A.to(dtype).t()


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dtype: torch.dtype, dropout: float, seed: int | None) -> Tensor:
        z = _projected(x, A, dtype, dropout, seed)
        ctx.A = A  # frozen; saved tensors would be freed by the first of several backward passes
        ctx.x_shape, ctx.dropout, ctx.seed = x.shape, dropout, seed
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gz: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gz.device):
            gx = gz @ ctx.A.to(gz.dtype)  # [T, in]
            if ctx.seed is not None:
                gx = gx.mul_(kept_mask(gx.shape, gx, ctx.dropout, ctx.seed)).mul_(1.0 / (1.0 - ctx.dropout))
        return gx.view(ctx.x_shape), None, None, None, None


def _add_vectors(
    y: Tensor, z: Tensor, B: Tensor, b: Tensor, d: Tensor, s: float, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """(the sum, B's product with d⊙z where the rows are few), without a graph."""
    dtype, u = y.dtype, None
    with without_autocast(y.device):
        total = y.detach() if overwrite else y.clone(memory_format=torch.contiguous_format)
        flat = total.view(-1, y.shape[-1])
        if z.shape[0] <= 2 * z.shape[1]:
            u = (z * d.to(dtype)) @ B.to(dtype).t()  # [T, out]
            flat.addcmul_(u, b.to(dtype), value=s)
        else:
            flat.addmm_(z, (b[:, None] * B * d).to(dtype).t(), alpha=s)
    return total, u


class _AddVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, B: Tensor, b: Tensor, d: Tensor, s: float, overwrite: bool) -> Tensor:
        total, u = _add_vectors(y, z, B, b, d, s, overwrite)
        trains = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        ctx.save_for_backward(z if trains else None, u if ctx.needs_input_grad[3] else None, B, b, d)
        ctx.s, ctx.few = s, u is not None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        z, u, B, b, d = ctx.saved_tensors
        dtype, s = gy.dtype, ctx.s
        _, z_wants, _, b_wants, d_wants, *_ = ctx.needs_input_grad
        gz = gb = gd = None
        with without_autocast(gy.device):
            g = gy.reshape(-1, gy.shape[-1])  # [T, out]
            if not ctx.few and (b_wants or d_wants):
                gM = (z.t() @ g).t().to(B.dtype) * B  # the gradient of diag(b)·B·diag(d), times B
                gb, gd = s * (gM @ d), s * (b @ gM)
            if ctx.few and b_wants:
                gb = s * (g * u).sum(0, dtype=b.dtype)
            if z_wants or (ctx.few and d_wants):
                gdz = g @ ((s * b)[:, None] * B).to(dtype)  # [T, R], before d
                if ctx.few and d_wants:
                    gd = (gdz * z).sum(0, dtype=d.dtype)
                gz = gdz.mul_(d.to(dtype)) if z_wants else None
        return gy, gz, None, gb if b_wants else None, gd if d_wants else None, None, None
