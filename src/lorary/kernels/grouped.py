"""Grouped products: rows sorted by expert, each times its own expert's matrix; and the low-rank update of these.

No product forms a matrix [E, out, in] of the update: `z = x A_e^T` [T, R] and `z B_e^T` [T, out] are computed for the
rows of each expert. An expert without rows costs nothing, and the gradient of its factors is exactly zero.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.low_rank import (
    dropout_and_seed,
    dropped_rows,
    in_steps,
    kept_mask,
    may_overwrite,
    needs_plain_operations,
    without_autocast,
)
from lorary.kernels.once_differentiable import once_differentiable
from lorary.kernels.torch_internals import FakeTensor

_grouped_mm: Any = getattr(F, "grouped_mm", None)  # torch 2.10
_ALIGNED = 16  # bytes of a row, of which the kernel wants a multiple


class Groups:
    """The experts of the rows of an input.

    Args:
        ids: [T] the expert of each row, ascending.
        count: E, the number of experts.

    Attributes:
        ends: [E] int32, the end of each expert's rows.
    """

    def __init__(self, ids: Tensor, count: int) -> None:
        self.ids, self.count = ids, count
        experts = torch.arange(count, device=ids.device, dtype=ids.dtype)
        self.ends = torch.searchsorted(ids, experts, right=True).to(torch.int32)

    @cached_property
    def rows(self) -> list[tuple[int, int, int]]:
        """(expert, first row, end) of the experts that have rows: waits for the device once."""
        T, E = len(self.ids), self.count
        unknown = self.ends.is_meta or isinstance(self.ends, FakeTensor)  # shapes alone are asked for
        ends = [T * (e + 1) // E for e in range(E)] if unknown else self.ends.tolist()
        return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start < end]


def grouped_product(x: Tensor, M: Tensor, groups: Groups) -> Tensor:
    """[T, n] = x [T, k] times its expert's matrix of M [E, k, n], of one dtype."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _product(x, M, groups.ids)
        return compiled
    with without_autocast(x.device):
        if _is_fast(x, M):
            return _grouped_mm(x, M, offs=groups.ends)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (x.requires_grad or M.requires_grad):
            pieces = [x[start:end] @ M[e] for e, start, end in groups.rows]
            return torch.cat(pieces) if pieces else x.new_zeros(0, M.shape[2])
        product = x.new_empty(len(x), M.shape[2])
        for e, start, end in groups.rows:
            torch.mm(x[start:end], M[e], out=product[start:end])
        return product


def grouped_outer(g: Tensor, x: Tensor, groups: Groups) -> Tensor:
    """[E, m, n] = the sum over each expert's rows of g [T, m] times x [T, n]; without a graph. Zero without rows."""
    if _is_fast(g, x):
        return _grouped_mm(g.t(), x, offs=groups.ends)  # type: ignore[no-any-return]
    sums = g.new_zeros(groups.count, g.shape[1], x.shape[1])
    for e, start, end in groups.rows:
        torch.mm(g[start:end].t(), x[start:end], out=sums[e])
    return sums


def _is_fast(x: Tensor, M: Tensor) -> bool:
    """Whether PyTorch has a grouped kernel for these operands: rows, and matrices or more rows."""
    if _grouped_mm is None or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if x.is_meta or isinstance(x, FakeTensor) or needs_plain_operations():  # without an address
        return False
    if x.device.type == "cuda" and x.dtype is not torch.bfloat16:
        return False
    sizes = {n * x.element_size() % _ALIGNED for n in (*M.shape[1:], x.shape[1])}
    return (
        sizes == {0}
        and x.numel() > 0
        and M.numel() > 0
        and x.is_contiguous()
        and (M.dim() == 3 or M.is_contiguous())
        and x.data_ptr() % _ALIGNED == 0
        and M.data_ptr() % _ALIGNED == 0
    )


def add_grouped_low_rank(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, groups: Groups, dropout: float = 0.0
) -> Tensor:
    """y + s (drop(x) A_e^T) B_e^T for the expert e of each row, computed in y's dtype.

    Args:
        y: [T, out] the frozen product, given up by the caller.
        x: [T, in] the rows, sorted by expert.
        A: [E, R, in], usually float32 masters; cast for the products.
        B: [E, out, R].
        s: the scale.
        groups: the experts of the rows.
        dropout: probability that an element of x is dropped.

    Returns:
        [T, out]. Backward keeps x (only where A trains), z [T, R] and the masters.
    """
    if torch.compiler.is_compiling():
        return _add_compiled(y, x, A, B, s, groups, dropout)
    if needs_plain_operations():
        return add_grouped_low_rank_reference(y, x, A, B, s, groups, dropout)
    dropout, seed = dropout_and_seed(dropout)
    if not torch.is_grad_enabled():
        return _add(y, x, A, B, s, groups, dropout, seed)[0]
    total: Tensor = _AddGrouped.apply(y, x, A, B, s, groups, dropout, seed)  # type: ignore[no-untyped-call]
    return total


def add_grouped_low_rank_reference(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, groups: Groups, dropout: float = 0.0
) -> Tensor:
    """The specification of `add_grouped_low_rank` in plain operations: one expert after the other."""
    rows = x.to(y.dtype)
    if dropout := in_steps(dropout):
        rows = rows * kept_mask(rows.shape, rows, *_drawn(dropout)) / (1.0 - dropout)
    total = y
    for e in range(groups.count):
        mine = (groups.ids == e)[:, None]
        update = F.linear(F.linear(rows, A[e].to(y.dtype)), B[e].to(y.dtype))
        total = total + torch.where(mine, s * update, 0.0)
    return total


def _drawn(dropout: float) -> tuple[float, int]:
    dropout, seed = dropout_and_seed(dropout)
    assert seed is not None
    return dropout, seed


def _add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, groups: Groups, dropout: float, seed: int | None
) -> tuple[Tensor, Tensor, float]:
    """(the sum, z times the scale, the scale), without a graph."""
    scale = s / (1.0 - dropout)
    with without_autocast(y.device):
        z = grouped_product(dropped_rows(x, y.dtype, dropout, seed), A.to(y.dtype).mT, groups).mul_(scale)  # [T, R]
        up = B.to(y.dtype).mT
        total = y.detach() if may_overwrite(y, x) else y.detach().clone()
        if _is_fast(z, up):
            total.add_(grouped_product(z, up, groups))
        else:
            for e, start, end in groups.rows:
                total[start:end].addmm_(z[start:end], up[e])
    return total, z, scale


class _AddGrouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, groups: Groups, dropout: float, seed: int | None
    ) -> Tensor:
        total, z, scale = _add(y, x, A, B, s, groups, dropout, seed)
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if a_wants else None,
            z if b_wants else None,
            A if x_wants else None,
            B if x_wants or a_wants else None,
        )
        ctx.x_shape, ctx.scale, ctx.groups, ctx.dropout, ctx.seed = x.shape, scale, groups, dropout, seed
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, B = ctx.saved_tensors
        groups, dtype = ctx.groups, gy.dtype
        _, x_wants, a_wants, b_wants, *_ = ctx.needs_input_grad
        gx = gA = gB = None
        with without_autocast(gy.device):
            g = gy.contiguous()
            kept = None
            if ctx.seed is not None and (x_wants or a_wants):
                kept = kept_mask(ctx.x_shape, g, ctx.dropout, ctx.seed)
            if b_wants:
                gB = grouped_outer(g, z, groups)  # [E, out, R] as B is laid out: autograd would copy a view, slowly
            if x_wants or a_wants:
                gz = grouped_product(g, B.to(dtype), groups).mul_(ctx.scale)  # [T, R]
            if x_wants:
                gx = grouped_product(gz, A.to(dtype), groups)  # [T, in]
                gx = gx if kept is None else gx.mul_(kept)
            if a_wants:
                rows = x.to(dtype)
                gA = grouped_outer(gz, rows if kept is None else kept.mul_(rows), groups)  # [E, R, in]
        return gy, gx, gA, gB, None, None, None, None


# --- compiled regions: operators that are opaque to the compiler, with the shapes and gradients that it needs ---------


def _add_compiled(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, groups: Groups, dropout: float) -> Tensor:
    rows = F.dropout(x.to(y.dtype), dropout)
    z = grouped_product(rows, A.to(y.dtype).mT, groups)
    return y + s * grouped_product(z, B.to(y.dtype).mT, groups)


@torch.library.custom_op(
    "lorary::grouped_product", mutates_args=(), schema="(Tensor x, Tensor M, Tensor ids) -> Tensor"
)
def _product(x: Tensor, M: Tensor, ids: Tensor) -> Tensor:
    """`grouped_product` by the expert of each row."""
    return grouped_product(x.contiguous(), M, Groups(ids, len(M)))


@torch.library.custom_op(
    "lorary::grouped_outer", mutates_args=(), schema="(Tensor g, Tensor x, Tensor ids, int count) -> Tensor"
)
def _outer(g: Tensor, x: Tensor, ids: Tensor, count: int) -> Tensor:
    """`grouped_outer` by the expert of each row."""
    return grouped_outer(g.contiguous(), x.contiguous(), Groups(ids, count))


@_product.register_fake
def _(x: Tensor, M: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], M.shape[2])


@_outer.register_fake
def _(g: Tensor, x: Tensor, ids: Tensor, count: int) -> Tensor:
    return g.new_empty(count, g.shape[1], x.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, M, ids = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, M, ids)


def _gradients(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    x, M, ids = ctx.saved_tensors
    gx = _product(gy, M.mT, ids) if ctx.needs_input_grad[0] else None
    gM = _outer(x, gy, ids, len(M)) if ctx.needs_input_grad[1] else None
    return gx, gM, None


_product.register_autograd(_gradients, setup_context=_setup)
