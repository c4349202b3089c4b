"""GLoRA's weight scaling `x·(W + W⊙(Ad·Au))ᵀ`, computed without storing a matrix of W's size.

`W⊙(Ad·Au)` has full rank, so it does not factor through rank r. The scaled weight is computed in forward and again in
backward, and freed at once; backward keeps `x`, the weight itself and the two factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.low_rank import needs_plain_operations, without_autocast
from lorary.kernels.once_differentiable import once_differentiable

_FEW = 2  # rows of input up to which r more products with W are faster than computing the scaled weight


def scaled_linear(x: Tensor, W: Tensor, Ad: Tensor, Au: Tensor, b: Tensor | None = None) -> Tensor:
    """`x·(W + W⊙(Ad·Au))ᵀ + b` in one product, for a weight in 32 bits or more.

    Args:
        x: [..., in] the input, in W's dtype.
        W: [out, in] the frozen weight, in any layout.
        Ad, Au: [out, r] and [r, in], the factors of the scaling matrix.
        b: [out] a bias, or None.

    Returns:
        [..., out]. If Ad is zero, the frozen layer's output, bit for bit.
    """
    if needs_plain_operations():
        return scaled_linear_reference(x, W, Ad, Au, b)
    out: Tensor = _ScaledLinear.apply(x, W, Ad, Au, b, W.dtype, True)  # type: ignore[no-untyped-call]
    return out


def scaled_linear_reference(x: Tensor, W: Tensor, Ad: Tensor, Au: Tensor, b: Tensor | None = None) -> Tensor:
    """The specification of `scaled_linear` in plain operations."""
    return F.linear(x, W + W * (Ad.to(W.dtype) @ Au.to(W.dtype)), b)


def add_scaled_linear(y: Tensor, x: Tensor, W: Tensor, Ad: Tensor, Au: Tensor) -> Tensor:
    """`y + x·(W⊙(Ad·Au))ᵀ`, in y's dtype.

    For 16-bit weights, where `W + W⊙(Ad·Au)` would round small updates away: the two terms are separate products.

    Args:
        y: [..., out] the frozen layer's output.
        x, W, Ad, Au: as for `scaled_linear`, of any floating dtypes.
    """
    if needs_plain_operations():
        return add_scaled_linear_reference(y, x, W, Ad, Au)
    term: Tensor = _ScaledLinear.apply(x, W, Ad, Au, None, y.dtype, False)  # type: ignore[no-untyped-call]
    return y + term


def add_scaled_linear_reference(y: Tensor, x: Tensor, W: Tensor, Ad: Tensor, Au: Tensor) -> Tensor:
    """The specification of `add_scaled_linear` in plain operations."""
    with without_autocast(y.device):
        return y + F.linear(x.to(y.dtype), W.to(y.dtype) * (Ad.to(y.dtype) @ Au.to(y.dtype)))


def recomputed(make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """make(*tensors), recomputed in backward from these tensors. `make` must not use random numbers."""
    if not torch.is_grad_enabled() or needs_plain_operations():  # the compiler recomputes by itself
        return make(*tensors)
    from torch.utils.checkpoint import checkpoint  # takes 0.2 s to import

    return cast(Tensor, checkpoint(make, *tensors, use_reentrant=False, preserve_rng_state=False))


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, Ad: Tensor, Au: Tensor, b: Tensor | None, dtype: torch.dtype, with_weight: bool
    ) -> Tensor:
        _, _, d_wants, u_wants, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if d_wants or u_wants else None, W, Ad, Au)
        ctx.x_shape, ctx.dtype, ctx.with_weight = x.shape, dtype, with_weight
        with without_autocast(x.device):
            x, few = x.to(dtype), x.numel() <= _FEW * x.shape[-1]
            if not few:
                return F.linear(x, _scaled(W, Ad, Au, dtype, with_weight), b)
            # (W⊙(d·u))·x = d⊙(W·(u⊙x))
            W = W.to(dtype)
            terms = F.linear(x.unsqueeze(-2) * Au.to(dtype), W)  # [..., r, out]
            scaled = (terms * Ad.to(dtype).t()).sum(-2)
            return F.linear(x, W, b) + scaled if with_weight else scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, Ad, Au = ctx.saved_tensors
        x_wants, _, d_wants, u_wants, b_wants, *_ = ctx.needs_input_grad
        gx = gAd = gAu = None
        with without_autocast(gy.device):
            g = gy.reshape(-1, gy.shape[-1])  # [T, out]
            if x_wants:
                gx = (g @ _scaled(W, Ad, Au, ctx.dtype, ctx.with_weight)).view(ctx.x_shape)
            if d_wants or u_wants:
                rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                gM = (g.t() @ rows).mul_(W)  # [out, in], the gradient of Ad·Au
                gAd = gM @ Au.to(ctx.dtype).t() if d_wants else None
                gAu = Ad.to(ctx.dtype).t() @ gM if u_wants else None
            gb = g.sum(0) if b_wants else None
        return gx, None, gAd, gAu, gb, None, None  # autograd casts each to the dtype of its tensor


def _scaled(W: Tensor, Ad: Tensor, Au: Tensor, dtype: torch.dtype, with_weight: bool) -> Tensor:
    """W⊙(Ad·Au), plus W if `with_weight`: [out, in], laid out like W so that products equal the layer's bit for bit."""
    scaled = torch.mm(Ad.to(dtype), Au.to(dtype), out=torch.empty_like(W, dtype=dtype, requires_grad=False))
    return torch.addcmul(W, W, scaled, out=scaled) if with_weight else scaled.mul_(W)
