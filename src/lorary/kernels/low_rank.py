"""The low-rank update `y + s · (drop(x)·Aᵀ)·Bᵀ`, with less memory than its plain composition.

Recorded by autograd, the plain composition keeps a copy of the activation in the adapter's dtype and the dropout mask.
In the fused node the factors are cast, not the activations; backward keeps `x` itself (which other layers share),
`z = drop(x)·Aᵀ` and the masters of `A` and `B`. Dropout masks are regenerated from their seed, and the product is
accumulated into `y`.

A node written in Python takes tens of microseconds, more than the arithmetic of a small input. Where the plain
composition keeps the same tensors (one dtype, no dropout) a small input therefore takes it, see `FUSED_FROM`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.once_differentiable import once_differentiable
from lorary.kernels.torch_internals import is_traced, storage_id

Pair = tuple[Tensor, Tensor]

# Elements of an output from which a fused node is used where plain operations would keep the same for backward: it
# saves one output-sized tensor and a pass over memory, and costs Python. Measured by `benchmarks/overhead.py --sweep`.
FUSED_FROM = 2**19
# How many times an output counts where plain operations keep more: casts of the factors, a mask, another product.
KEEPS_MORE = 128


def add_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float = 0.0, frozen: Pair | None = None
) -> Tensor:
    """A layer's output plus `s · (drop(x)·Aᵀ)·Bᵀ`, computed in the output's dtype.

    Args:
        y: [..., out] the frozen layer's output, given up by the caller: its memory becomes the result's where
            that is safe. A leaf that wants a gradient, or a `y` that shares memory with `x`, stays untouched.
        x: [..., in] the layer's input, of any floating dtype.
        A: [R, in] first factor, usually a float32 master; cast for the product, in forward and in backward.
        B: [out, R] second factor.
        s: scale of the product, α/r for LoRA.
        dropout: probability in [0, 1) that an element of `x` is dropped from the adapter's input; 0 when not
            training, in steps of 2⁻¹⁶. The mask depends on the state of torch's default CPU generator alone, on
            every device.
        frozen: (A [R', in], B [out, R']) that get no gradient; their product is added as well. Not with dropout.

    Returns:
        [..., out] the sum, in `y`'s dtype. Its gradient can be taken once, not twice. The input is kept for
        backward only where `A` trains.

    Example:
        >>> y = torch.nn.functional.linear(x, W)
        >>> y = add_low_rank(y, x, A, B, s=alpha / r)
    """
    if needs_plain_operations():
        return add_low_rank_reference(y, x, A, B, s, dropout, frozen)
    if frozen is None:
        same = y.dtype is x.dtype is A.dtype is B.dtype
        if is_small(y) if same and not dropout else is_small(y, KEEPS_MORE):
            small = _add_plainly(y, x, A, B, s, dropout, same)
            if small is not None:
                return small
    dropout, seed = dropout_and_seed(dropout)
    if frozen is not None and dropout > 0.0:
        raise ValueError("`frozen` does not support dropout")
    fixed = frozen or (None, None)
    if not torch.is_grad_enabled():
        return _add(y, x, A, B, s, dropout, seed, *fixed)[0]
    total: Tensor = _AddLowRank.apply(y, x, A, B, s, dropout, seed, *fixed)  # type: ignore[no-untyped-call]
    return total


def _add_plainly(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float, same: bool) -> Tensor | None:
    """The sum in plain operations; None where autocast would compute it in another dtype than the output's."""
    shape = None if y.dim() == 2 else y.shape
    if shape is not None:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, shape[-1])
    if not same:
        x, A, B = x.to(y.dtype), A.to(y.dtype), B.to(y.dtype)
    if dropout:
        dropout = in_steps(dropout)
        x, s = x * kept_mask(x.shape, x, dropout, draw_seed()), s / (1.0 - dropout)
    z = F.linear(x, A)
    if z.dtype is not y.dtype:
        return None
    total = torch.addmm(y, z, B.t(), alpha=s)
    return total if shape is None else total.view(shape)


def add_low_rank_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float = 0.0, frozen: Pair | None = None
) -> Tensor:
    """The specification of `add_low_rank` in plain operations, used wherever `needs_plain_operations`.

    Outside compiled regions it drops the same elements as `add_low_rank` from the same random state.
    """
    with without_autocast(y.device):
        dropped = dropped_plainly(x, y.dtype, dropout)
        if frozen is not None:
            A, B = torch.cat([A, frozen[0].detach()]), torch.cat([B, frozen[1].detach()], 1)
        return y + s * F.linear(F.linear(dropped, A.to(y.dtype)), B.to(y.dtype))


def dropped_plainly(x: Tensor, dtype: torch.dtype, dropout: float) -> Tensor:
    """drop(x) in plain operations, in this dtype, with the scale 1/(1-p)."""
    x = x.to(dtype)
    if dropout > 0.0 and torch.compiler.is_compiling():
        return F.dropout(x, dropout)
    if dropout > 0.0:
        dropout = in_steps(dropout)
        return x * kept_mask(x.shape, x, dropout, draw_seed()) / (1.0 - dropout)
    return x


def _add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    dropout: float,
    seed: int | None,
    frozen_A: Tensor | None,
    frozen_B: Tensor | None,
) -> tuple[Tensor, Tensor, float]:
    """(the sum, z, the scale of z·Bᵀ), without a graph."""
    dtype = y.dtype
    with without_autocast(y.device):
        down, up = _joined(A, frozen_A, 0, dtype), _joined(B, frozen_B, 1, dtype)
        z = dropped_rows(x, dtype, dropout, seed) @ down.t()  # [T, R + R']
        # 1/(1-p) of inverted dropout goes into the scale, which saves a pass over the activation
        scale = s / (1.0 - dropout)
        if may_overwrite(y, x):
            # detach() shares memory and version counter with y. To autograd it is a new tensor, so y may be a
            # view; and a layer that saved y for its own backward raises an error on the version instead of
            # computing with a changed value.
            total = y.detach()
            total.view(-1, B.shape[0]).addmm_(z, up.t(), alpha=scale)
        else:
            flat = y.reshape(-1, B.shape[0])
            total = torch.addmm(flat, z, up.t(), alpha=scale).view(y.shape)
    return total, z, scale


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float, seed: int | None, *frozen: Any
    ) -> Tensor:
        frozen_A, frozen_B = frozen
        total, z, scale = _add(y, x, A, B, s, dropout, seed, frozen_A, frozen_B)
        r = A.shape[0]
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if a_wants else None,
            (z if frozen_A is None else z[:, :r].clone()) if b_wants else None,
            A if x_wants else None,
            B if x_wants or a_wants else None,
            frozen_A if x_wants else None,
            frozen_B if x_wants else None,
        )
        ctx.x_shape, ctx.scale, ctx.dropout, ctx.seed = x.shape, scale, dropout, seed
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B, frozen_A, frozen_B = ctx.saved_tensors
        dtype, width = gy.dtype, ctx.x_shape[-1]
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        gx = gA = gB = None
        with without_autocast(gy.device):
            g = gy.reshape(-1, gy.shape[-1])  # [T, out]
            kept = None
            if ctx.seed is not None and (x_wants or a_wants):
                kept = kept_mask((g.shape[0], width), g, ctx.dropout, ctx.seed)
            if b_wants:
                gB = _scaled(ctx.scale, z.t(), g).t()  # [out, R]: faster this way round
            if x_wants or a_wants:
                gz = _scaled(ctx.scale, g, _joined(B, frozen_B, 1, dtype))  # [T, R + R']
            if x_wants:
                gx = gz @ _joined(A, frozen_A, 0, dtype)  # [T, in]
                gx = (gx if kept is None else gx.mul_(kept)).view(ctx.x_shape)
            if a_wants:
                rows = x.reshape(-1, width).to(dtype)
                rows = rows if kept is None else kept.mul_(rows)  # the mask is not needed any more
                gA = gz[:, : B.shape[1]].t() @ rows  # [R, in]
        return gy, gx, gA, gB, None, None, None, None, None  # autograd casts each to the dtype of its tensor


def _joined(factor: Tensor, frozen: Tensor | None, dim: int, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype) if frozen is None else torch.cat([factor.to(dtype), frozen.to(dtype)], dim)


def _scaled(s: float, left: Tensor, right: Tensor) -> Tensor:
    """s · left·right in one kernel (with beta = 0 only the dtype of the first argument matters)."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=s)


def needs_plain_operations() -> bool:
    """Whether a compiler, a tracer or a functorch transform is looking: they see into plain operations only."""
    return torch.compiler.is_compiling() or is_traced()


def is_small(y: Tensor, weight: int = 1) -> bool:
    """Whether plain operations make this output faster than a fused node; `weight` makes it count several times."""
    return y.numel() * weight < FUSED_FROM


def may_overwrite(y: Tensor, x: Tensor) -> bool:
    """Whether the result may overwrite y: only the caller, who gives it up, can be reading it."""
    if not y.is_contiguous() or (y.is_leaf and y.requires_grad):
        return False
    if y.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return storage_id(y) != storage_id(x)


def dropout_and_seed(dropout: float) -> tuple[float, int | None]:
    """The dropout probability that `kept_mask` takes, and a seed for the mask; None without dropout."""
    dropout = in_steps(dropout)
    return dropout, draw_seed() if dropout > 0.0 else None


def dropped_rows(x: Tensor, dtype: torch.dtype, dropout: float, seed: int | None) -> Tensor:
    """[T, in] the rows of x [..., in] in this dtype, dropped elements zero; the scale 1/(1-p) is the caller's."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    return rows if seed is None else kept_mask(rows.shape, rows, dropout, seed).mul_(rows)


def draw_seed() -> int:
    """A seed from torch's default CPU generator, whose state checkpointing and resumed runs restore."""
    return int(torch.randint(2**62, (), device="cpu").item())


def kept_mask(shape: tuple[int, ...] | torch.Size, like: Tensor, dropout: float, seed: int) -> Tensor:
    """The dropout mask, 1 for kept elements, in `like`'s dtype; a function of seed, shape and device.

    It uses sixteen random bits per element, `dropout` being a multiple of 2⁻¹⁶. Where `bernoulli_` draws one number per
    element (a CPU without MKL's generators) this is three times as fast, so that drawing the mask twice takes less time
    than drawing and keeping it once.
    """
    mask = torch.empty(shape, dtype=like.dtype, device=like.device)
    # the meta device has shapes but no randomness
    generator = None if like.is_meta else torch.Generator(device=like.device).manual_seed(seed)
    words = torch.empty(-(-mask.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: mask.numel()].view(shape)
    return torch.ge(bits, round(dropout * 2**16) - 2**15, out=mask)


def in_steps(dropout: float) -> float:
    """The nearest probability below 1 that is a multiple of 2⁻¹⁶."""
    return min(round(dropout * 2**16), 2**16 - 1) / 2**16


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, for products whose dtypes are chosen explicitly."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else contextlib.nullcontext()


def autocasting(device: torch.device) -> bool:
    """Whether autocast is enabled on this device; it does not support every device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def under_the_same_autocast(make: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """A function under the autocast that is on now, wherever it is called."""
    if not torch.amp.is_autocast_available(device):
        return make
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def again() -> Tensor:
        with torch.autocast(device, dtype, enabled):
            return make()

    return again
