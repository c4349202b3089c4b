"""DoRA's analysis: the mean change of the rows in magnitude and in direction."""

from __future__ import annotations

import math

import pytest
import torch

from lorary.analysis.inspection.magnitude_direction import MagnitudeDirection, correlation, magnitude_direction


def test_longer_rows_have_not_turned() -> None:
    W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = magnitude_direction(W, 1.5 * W)
    assert found.magnitude == pytest.approx(0.5 * float(W.norm(dim=1).mean()), rel=1e-6)
    assert found.direction == pytest.approx(0, abs=1e-12)


def test_turned_rows_are_as_long_as_before() -> None:
    W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    a = math.radians(60)
    turn = torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    found = magnitude_direction(W, W @ turn)
    assert found.magnitude == pytest.approx(0, abs=1e-6)
    assert found.direction == pytest.approx(0.5, rel=1e-6)  # 1 - cos 60 degrees


def test_rows_are_the_outputs() -> None:
    """The paper's columns: its weights are [in, out]."""
    W = torch.eye(3)
    tuned = W.clone()
    tuned[0, 0] = 4.0
    tuned[0, 1] = 3.0
    found = magnitude_direction(W, tuned)
    assert found == MagnitudeDirection(pytest.approx(4 / 3), pytest.approx((1 - 4 / 5) / 3))


def test_a_turn_below_the_rounding_of_a_cosine_is_seen() -> None:
    W, tuned = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    assert magnitude_direction(W, tuned).direction == pytest.approx(5e-11, rel=1e-4)


def test_a_zero_row_counts_in_the_magnitude_alone() -> None:
    found = magnitude_direction(torch.zeros(2, 3), torch.ones(2, 3))
    assert found == (pytest.approx(math.sqrt(3)), 0.0)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 1), (2, 2), (3, 3)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (2, 2)], None),
        ([(1, 1), (2, 1), (3, 1)], None),
        ([], None),
    ],
)
def test_the_correlation(points: list[tuple[float, float]], expected: float | None) -> None:
    found = correlation([MagnitudeDirection(*point) for point in points])
    assert found == (None if expected is None else pytest.approx(expected))
