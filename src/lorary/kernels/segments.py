"""Low-rank updates by rows: `y[rows] + s·(x[rows]·Aᵀ)·Bᵀ` with factors of their own for each segment of the rows.

Serving adds the terms of its requests' adapters so; training adds those of several adapters that share one forward
pass of a base. One node of the graph takes all segments, so that rows are neither cut apart nor put together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.low_rank import (
    add_low_rank_reference,
    may_overwrite,
    needs_plain_operations,
    without_autocast,
)
from lorary.kernels.once_differentiable import once_differentiable


@dataclass(frozen=True, eq=False)
class Segment:
    """Successive rows and their factors.

    Args:
        rows: their number.
        A: [R, in], usually a float32 master; cast for the products.
        B: [out, R].
        s: scale of the product.
    """

    rows: int
    A: Tensor
    B: Tensor
    s: float


def add_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float = 1.0) -> Tensor:
    """Add `s·(x·Aᵀ)·Bᵀ` to y [rows, out], in place, for x [rows, in]; the product `x·Aᵀ` [rows, R]."""
    z = F.linear(x, A if A.dtype is x.dtype else A.to(x.dtype))
    if B.dtype is z.dtype is y.dtype:
        y.addmm_(z, B.t(), alpha=s)
    else:
        y.addmm_(z.to(y.dtype), B.t().to(y.dtype), alpha=s)
    return z


def add_segments(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """A layer's output plus the update of every segment of its rows, computed in the output's dtype.

    Args:
        y: [rows..., out] the frozen layer's output, which may be overwritten as in `add_low_rank`. The first dimension,
            or what a caller has flattened into it, is that of the segments.
        x: [rows..., in] the layer's input.
        segments: of the first dimension, in order; together all of it.

    Returns:
        [rows..., out] the sum, in `y`'s dtype. Its gradient can be taken once.
    """
    if needs_plain_operations():
        return add_segments_reference(y, x, segments)
    each = y.shape[:-1].numel() // max(y.shape[0], 1)  # rows of the product for one of the first dimension
    sizes = tuple(segment.rows * each for segment in segments)
    factors = [factor for segment in segments for factor in (segment.A, segment.B)]
    scales = tuple(segment.s for segment in segments)
    if not torch.is_grad_enabled():
        return _add(y, x, sizes, scales, factors)[0]
    total: Tensor = _AddSegments.apply(y, x, sizes, scales, *factors)  # type: ignore[no-untyped-call]
    return total


def add_segments_reference(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The specification of `add_segments`: every segment by itself, in plain operations."""
    rows = [segment.rows for segment in segments]
    parts = zip(y.split(rows), x.split(rows), segments, strict=True)
    return torch.cat([add_low_rank_reference(y_k, x_k, one.A, one.B, one.s) for y_k, x_k, one in parts])


def _add(
    y: Tensor, x: Tensor, sizes: Sequence[int], scales: Sequence[float], factors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """(the sum, the product with A of each segment), without a graph."""
    with without_autocast(y.device):
        total = y.detach() if may_overwrite(y, x) else y.detach().clone(memory_format=torch.contiguous_format)
        flat, rows = total.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype)
        pieces = zip(flat.split(list(sizes)), rows.split(list(sizes)), scales, strict=True)
        products = [
            add_product(y_k, x_k, A, B, s)
            for (y_k, x_k, s), A, B in zip(pieces, factors[::2], factors[1::2], strict=True)
        ]
    return total, products


class _AddSegments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, sizes: tuple[int, ...], scales: tuple[float, ...], *factors: Tensor
    ) -> Tensor:
        total, products = _add(y, x, sizes, scales, factors)
        wanted = ctx.needs_input_grad
        trains_A, trains_B = any(wanted[4::2]), wanted[5::2]
        kept = [z if wants else None for z, wants in zip(products, trains_B, strict=True)]
        ctx.save_for_backward(x if trains_A else None, *kept, *factors)
        ctx.x_shape, ctx.sizes, ctx.scales = x.shape, sizes, scales
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.sizes)
        x, *saved = ctx.saved_tensors
        products, factors = saved[:count], saved[count:]
        x_wants, wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        gradients: list[Tensor | None] = []
        with without_autocast(gy.device):
            g = gy.reshape(-1, gy.shape[-1]).split(list(ctx.sizes))
            gx = gy.new_empty(sum(ctx.sizes), ctx.x_shape[-1]) if x_wants else None
            gx_parts = [None] * count if gx is None else gx.split(list(ctx.sizes))
            x_parts = [None] * count if x is None else x.reshape(-1, ctx.x_shape[-1]).split(list(ctx.sizes))
            for k in range(count):
                A, B = factors[2 * k : 2 * k + 2]
                found = _backward_of(g[k], x_parts[k], products[k], A, B, ctx.scales[k], wanted[2 * k], gx_parts[k])
                gradients += found
        return gy, None if gx is None else gx.view(ctx.x_shape), None, None, *gradients


def _backward_of(
    g: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    a_wants: bool,
    gx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of A, of B) of one segment; writes that of its input into `gx`."""
    gA = gB = None
    if z is not None:
        gB = (z.t() @ g).mul_(s).t()  # [out, R]: faster this way round
    if a_wants or gx is not None:
        gz = (g @ B.to(g.dtype)).mul_(s)  # [rows, R]
        if gx is not None:
            torch.mm(gz, A.to(g.dtype), out=gx)
        if a_wants and x is not None:
            gA = gz.t() @ x.to(g.dtype)
    return gA, gB
