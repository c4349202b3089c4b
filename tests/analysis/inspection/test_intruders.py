"""Intruder dimensions on planted cases (Shuttleworth et al. 2024)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorary.analysis.inspection.intruders import Basis, Intruders, intruders


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(out: int, inp: int, seed: int = 0) -> Basis:
    """A base whose singular values fall from 16 by one each."""
    k = min(out, inp)
    U, V = torch.linalg.qr(random(out, k, seed=seed))[0], torch.linalg.qr(random(inp, k, seed=seed + 1))[0]
    return Basis(U, 16.0 - torch.arange(k), V.T)


def matrix(basis: Basis) -> Tensor:
    return basis.U * basis.S @ basis.V


def counts(W: Tensor, tuned: Tensor, **options: float) -> tuple[int, int]:
    found = intruders(Basis.of(W), Basis.of(tuned), **options)  # type: ignore[arg-type]
    return found.count, found.count_right


@pytest.mark.parametrize("shape", [(24, 14), (14, 24), (16, 16)])
def test_an_unchanged_weight_has_none(shape: tuple[int, int]) -> None:
    W = matrix(spread(*shape))
    found = intruders(Basis.of(W), Basis.of(W))
    assert (found.count, found.count_right) == (0, 0)
    assert len(found.left) == len(found.right) == 10
    assert min(found.left + found.right) > 0.999
    assert counts(W, 3 * W) == (0, 0), "a longer weight has the same directions"
    assert counts(W, -W) == (0, 0), "and so has its negative"


def planted(sigma: float) -> tuple[Tensor, Tensor]:
    """W, and W + sigma u v^T with u orthogonal to its columns and v its last right singular vector."""
    base = spread(24, 14)
    u = random(24, seed=5)
    u -= base.U @ (base.U.T @ u)
    W = matrix(base)
    return W, W + sigma * torch.outer(u / u.norm(), base.V[-1])


def test_a_new_direction_above_the_tenth_singular_value_is_exactly_one() -> None:
    W, tuned = planted(9.0)  # the singular values are 16, 15, ..., 3
    assert counts(W, tuned) == (1, 0), "v is a direction of the base"
    found = intruders(Basis.of(W), Basis.of(tuned))
    # u' = (3 u_14 + 9 u) / sqrt(90): its cosine with u_14 is the largest
    assert sorted(found.left)[0] == pytest.approx(3 / 90**0.5, abs=1e-4)


def test_a_new_direction_below_the_tenth_is_not_counted() -> None:
    W, tuned = planted(5.5)  # sqrt(39) is the 11th
    assert counts(W, tuned) == (0, 0)
    assert counts(W, tuned, top=14) == (1, 0)


def test_the_right_side_is_counted_by_itself() -> None:
    W, tuned = planted(9.0)
    assert counts(W.T, tuned.T) == (0, 1)


def test_signs_of_singular_vectors_do_not_matter() -> None:
    W, tuned = planted(9.0)
    base, other = Basis.of(W), Basis.of(tuned)
    signs = torch.where(torch.arange(14) % 3 == 0, -1.0, 1.0)
    flipped = Basis(other.U * signs, other.S, signs[:, None] * other.V)
    flipped_base = Basis(base.U * -signs, base.S, -signs[:, None] * base.V)
    assert intruders(flipped_base, flipped) == intruders(base, other)


def test_epsilon_is_the_cosine_below_which_a_vector_intrudes() -> None:
    W, tuned = planted(9.0)
    assert counts(W, tuned, epsilon=0.31) == (0, 0)
    assert counts(W, tuned, epsilon=0.32) == (1, 0)
    assert Intruders((0.5,), (0.49,), 0.5).count == 0, "at epsilon it is none"


def test_directions_without_a_singular_value_are_arbitrary_and_not_counted() -> None:
    u, v = random(20, 2), random(2, 20, seed=1)
    found = intruders(Basis.of(u @ v), Basis.of(u @ v))
    assert len(found.left) == 2
    assert (found.count, found.count_right) == (0, 0)


def test_everything_intrudes_into_a_zero_weight() -> None:
    assert counts(torch.zeros(12, 12), random(12, 12)) == (10, 10)
    assert counts(random(12, 12), torch.zeros(12, 12)) == (0, 0), "and a zero weight has no directions"
