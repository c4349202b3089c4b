"""Grouped products and the grouped low-rank update against a loop over the experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorary.kernels.grouped import (
    Groups,
    add_grouped_low_rank,
    add_grouped_low_rank_reference,
    grouped_outer,
    grouped_product,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# the rows of each of four experts: some have none, and 8 x 16 has rows of a multiple of 16 bytes
COUNTS = [(3, 0, 4, 2), (0, 0, 9, 0), (9, 0, 0, 0), (2, 3, 2, 2)]


def groups_of(counts: tuple[int, ...]) -> Groups:
    return Groups(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), len(counts))


def tensors(dtype: torch.dtype, out: int = 8, inp: int = 16, r: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(9, out), (9, inp), (4, r, inp), (4, out, r)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    size = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert (a - b).norm() <= size * b.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(8, 16), (6, 5)])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_grouped_product_is_that_of_each_experts_rows(
    counts: tuple[int, ...], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    groups, (n, k) = groups_of(counts), sizes
    x, M, g = (torch.randn(shape, dtype=dtype) for shape in ((9, k), (4, k, n), (9, n)))
    expected = torch.stack([x[i] @ M[e] for i, e in enumerate(groups.ids.tolist())])
    close(grouped_product(x, M, groups), expected, dtype)
    close(grouped_product(x.requires_grad_(), M, groups), expected, dtype)
    outer = torch.stack([g[groups.ids == e].T @ x[groups.ids == e] for e in range(4)])
    close(grouped_outer(g, x.detach(), groups), outer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_update_and_its_gradients_are_the_references(
    counts: tuple[int, ...], dropout: float, dtype: torch.dtype
) -> None:
    groups, found = groups_of(counts), []
    for function in (add_grouped_low_rank, add_grouped_low_rank_reference):
        y, x, A, B = tensors(dtype)
        torch.manual_seed(5)  # the same mask
        total = function(y * 1.0, x, A, B, 0.5, groups, dropout)
        total.square().sum().backward()
        found.append([total, *(t.grad for t in (y, x, A, B))])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        close(a, b, dtype)


def test_an_expert_without_rows_has_a_gradient_of_exactly_zero() -> None:
    y, x, A, B = tensors(torch.float32)
    add_grouped_low_rank(y * 1.0, x, A, B, 1.0, groups_of((3, 0, 4, 2))).sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    for grad in (A.grad, B.grad):
        assert not grad[1].any()
        assert all(grad[e].any() for e in (0, 2, 3))


def test_32_bit_masters_of_a_16_bit_output() -> None:
    y, x, A, B = tensors(torch.float32)
    out = add_grouped_low_rank(y.bfloat16(), x.bfloat16(), A, B, 1.0, groups_of((3, 0, 4, 2)))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


def test_backward_keeps_the_rows_their_projections_and_the_masters_alone() -> None:
    y, x, A, B = tensors(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_grouped_low_rank(y * 1.0, x, A, B, 1.0, groups_of((3, 0, 4, 2)))
    assert sorted(tuple(t.shape) for t in kept) == sorted([(9, 16), (9, 4), (4, 4, 16), (4, 8, 4)])


def test_no_rows_at_all() -> None:
    _, _, A, B = tensors(torch.float32)
    y, x = torch.zeros(0, 8), torch.zeros(0, 16)
    assert add_grouped_low_rank(y, x, A, B, 1.0, groups_of((0, 0, 0, 0))).shape == (0, 8)
    assert grouped_product(x, A.mT, groups_of((0, 0, 0, 0))).shape == (0, 4)


def test_the_gradients_of_torch_func() -> None:
    _, x, A, B = tensors(torch.float32)
    groups = groups_of((3, 0, 4, 2))

    def loss(A: Tensor, B: Tensor) -> Tensor:
        y = grouped_product(x.detach(), torch.ones(4, 16, 8), groups)
        return add_grouped_low_rank(y, x.detach(), A, B, 0.5, groups).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(A.detach(), B.detach())
    expected = torch.autograd.grad(loss(A, B), [A, B])
    for a, b in zip(found, expected, strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_laid_out_as_their_factors(counts: tuple[int, ...]) -> None:
    """Autograd keeps such a gradient; it would copy one of another layout, which took longer than all products."""
    y, x, A, B = tensors(torch.float32)
    total = add_grouped_low_rank(y * 1.0, x, A, B, 0.5, groups_of(counts))
    for factor, gradient in zip((A, B), torch.autograd.grad(total.sum(), (A, B)), strict=True):
        assert gradient.stride() == factor.stride()
