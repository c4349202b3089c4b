"""The figures of a spectrum: ranks, energy, and the least error of a lower rank."""

from __future__ import annotations

import math

import pytest
import torch

from lorary.analysis.inspection.spectrum import Spectrum


def test_equal_directions_count_the_same_in_both_ranks() -> None:
    spectrum = Spectrum((2.0,) * 5)
    assert spectrum.stable_rank == pytest.approx(5)
    assert spectrum.entropy_rank == pytest.approx(5)
    assert spectrum.norm == pytest.approx(math.sqrt(20))


def test_a_dominant_direction_leaves_a_stable_rank_near_one() -> None:
    spectrum = Spectrum((1.0, *[0.1] * 10))
    assert spectrum.stable_rank == pytest.approx(1.1)
    p = [0.5, *[0.05] * 10]
    assert spectrum.entropy_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_the_tail_is_the_error_of_the_truncated_decomposition() -> None:
    W = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    spectrum = Spectrum.of(S)
    for k in range(7):
        error = float((W - U[:, :k] * S[:k] @ V[:k]).norm())
        assert spectrum.tail(k) == pytest.approx(error, abs=1e-12)
        assert spectrum.energy(k) == pytest.approx(1 - error**2 / float(W.norm()) ** 2, abs=1e-12)
    assert spectrum.tail(100) == 0.0


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.5, 1), (0.89, 1), (0.9, 1), (0.91, 2), (0.99, 2), (1.0, 3)])
def test_the_rank_for_a_share_of_the_energy(share: float, rank: int) -> None:
    spectrum = Spectrum((math.sqrt(90.0), math.sqrt(9.0), 1.0))
    assert spectrum.rank_for(share) == rank


@pytest.mark.parametrize("values", [(), (0.0, 0.0)])
def test_a_zero_matrix_has_no_directions(values: tuple[float, ...]) -> None:
    spectrum = Spectrum(values)
    assert (spectrum.norm, spectrum.stable_rank, spectrum.entropy_rank) == (0, 0, 0)
    assert (spectrum.rank_for(0.9), spectrum.energy(1), spectrum.tail(0)) == (0, 1, 0)


def test_a_record_holds_the_largest_values_only() -> None:
    record = Spectrum(tuple(float(i) for i in range(300, 0, -1))).to_dict()
    assert record["singular_values"] == [float(i) for i in range(300, 44, -1)]
    assert record["rank_for_energy"]["0.9"] < 300
