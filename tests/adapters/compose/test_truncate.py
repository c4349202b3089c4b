"""The truncated SVD of a product from its factors: the dense SVD's values, balanced factors, the exact error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.compose.truncate import (
    balanced,
    cut_problems,
    numerical_rank,
    product_svd,
    rank_of_energy,
    relative,
    truncated_product,
)

# more rows than directions, fewer, one, and none that are left
SHAPES = [(24, 4, 17), (5, 8, 30), (30, 8, 5), (6, 9, 6), (1, 3, 9), (12, 1, 12)]


def factors(out: int, R: int, inp: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out * 100 + R)
    return torch.randn(out, R, generator=generator), torch.randn(R, inp, generator=generator)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_dense_svd(shape: tuple[int, int, int]) -> None:
    B, A = factors(*shape)
    dense = B.double() @ A.double()
    S = torch.linalg.svdvals(dense)[: min(shape)]
    svd = product_svd(B, A)
    torch.testing.assert_close(svd.S, S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(svd.U * svd.S @ svd.V, dense, rtol=1e-11, atol=1e-11)
    assert numerical_rank(svd) == min(shape)
    for r in range(1, min(shape) + 1):
        cut = truncated_product(B, A, rank=r)
        found = cut.B.double() @ cut.A.double()
        assert cut.lost == pytest.approx(float((dense - found).norm()), rel=1e-5, abs=2e-6 * float(S[0]))
        assert cut.lost == pytest.approx(float(S[r:].norm()), rel=1e-9, abs=1e-12)
        assert cut.norm == pytest.approx(float(dense.norm()))
        torch.testing.assert_close(cut.B.norm(dim=0), cut.A.norm(dim=1))  # balanced
        assert (cut.B.dtype, cut.A.dtype, cut.A.shape[0]) == (torch.float32, torch.float32, r)


def test_the_energy_is_a_share_of_the_squared_norm() -> None:
    S = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    assert [rank_of_energy(S, e) for e in (0.5, 0.64, 0.65, 0.8, 0.9, 0.96, 0.97, 1.0)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert rank_of_energy(torch.zeros(3), 1.0) == 0
    cut = truncated_product(torch.diag(S), torch.eye(4), energy=0.8)
    assert cut.error == pytest.approx((1 - 20 / 25) ** 0.5)
    assert relative([(3.0, 10.0), (4.0, 0.0)]) == pytest.approx(0.5)
    assert relative([]) == relative([(0.0, 0.0)]) == 0.0


def test_directions_that_are_only_rounding_are_left_out() -> None:
    B, A = factors(20, 3, 30)
    twice = truncated_product(torch.cat([B, 2 * B], 1), torch.cat([A, A]), energy=1.0)
    assert twice.A.shape[0] == 3
    torch.testing.assert_close(twice.B @ twice.A, 3 * B @ A)
    assert truncated_product(torch.cat([B, B], 1), torch.cat([A, A]), rank=5).A.shape[0] == 3
    zero = truncated_product(torch.zeros(4, 2), torch.ones(2, 5), energy=0.9)
    assert (zero.B.shape, zero.error, zero.norm) == ((4, 1), 0.0, 0.0)


def test_a_wide_product_is_never_formed() -> None:
    """A dense fp64 [200,000, 20,000] would take 32 GB."""
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(200_000, 2, generator=generator), torch.randn(2, 20_000, generator=generator)
    cut = balanced(product_svd(B, A), 1)
    assert 0 < cut.error < 1
    assert cut.norm == pytest.approx(float(((B.double().T @ B.double()) @ (A.double() @ A.double().T)).trace()) ** 0.5)


CUTS: list[tuple[dict[str, Any], str]] = [
    ({"rank": None, "energy": None}, "rank or energy: one of them says how much to keep; given: none"),
    ({"rank": 2, "energy": 0.5}, "given: rank, energy"),
    ({"rank": 0, "energy": None}, "rank: is 0, not a whole number from 1 to 65,536"),
    ({"rank": 70_000, "energy": None}, "rank: is 70000, not a whole number"),
    ({"rank": 2.0, "energy": None}, "rank: is 2.0, not a whole number"),
    ({"rank": True, "energy": None}, "rank: is True, not a whole number"),
    ({"rank": None, "energy": 0.0}, "energy: is 0.0, not a share above 0 and at most 1"),
    ({"rank": None, "energy": 99}, "energy: is 99, not a share"),
    ({"rank": None, "energy": float("nan")}, "energy: is nan, not a share"),
    ({"rank": None, "energy": "0.9"}, "energy: is '0.9', not a share"),
    ({"rank": None, "energy": None, "kl": -1.0}, "kl: is -1.0, not a finite number above 0"),
    ({"rank": None, "energy": None, "kl": float("inf")}, "kl: is inf, not a finite number above 0"),
    ({"rank": 4, "energy": None, "kl": 0.1}, "rank, energy or kl: one of them says how much to keep; given: rank, kl"),
]


@pytest.mark.parametrize(("cuts", "sentence"), CUTS, ids=[s for _, s in CUTS])
def test_an_invalid_cut_is_refused(cuts: dict[str, Any], sentence: str) -> None:
    assert [sentence in str(p) for p in cut_problems(**cuts)] == [True]


@pytest.mark.parametrize("name", ["rank", "energy", "kl"])
def test_one_valid_cut_is_enough(name: str) -> None:
    assert cut_problems(**{"rank": None, "energy": None, "kl": None, name: 1}) == []
