"""The rules of the search: rates, hopeless and diverged runs, the best one, the next one outwards."""

from __future__ import annotations

import math

import pytest

from lorary.analysis.comparison.record import Ending, Trial
from lorary.train.compare.search import best_trial, edge, evaluation_steps, ladder, next_outward, third, why_ended

GOOD = ((0, 5.0), (2, 4.8), (4, 4.0), (6, 3.6), (12, 3.2))


def tried(lr: float, loss: float, ending: Ending = "finished") -> Trial:
    return Trial("lora", lr, 0, 12, ((0, 5.0), (12, loss)), ending)


@pytest.mark.parametrize(
    ("centre", "rates", "spacing", "expected"),
    [
        (2e-4, 3, 10**0.5, (6.3e-5, 2e-4, 6.3e-4)),
        (1e-3, 5, 10**0.5, (1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)),
        (1e-3, 1, 10**0.5, (1e-3,)),
        (0.3, 3, 10**0.5, (0.095, 0.3, 0.95)),
        (0.5, 3, 4.0, (0.12, 0.5)),  # none above 1
        (1e-3, 3, 1.1, (9.091e-4, 1e-3, 1.1e-3)),
    ],
)
def test_the_rates_around_a_centre(centre: float, rates: int, spacing: float, expected: tuple[float, ...]) -> None:
    assert ladder(centre, rates, spacing) == expected


@pytest.mark.parametrize(("steps", "every", "when"), [(1, 1, 1), (6, 1, 2), (7, 2, 4), (60, 10, 20), (100, 17, 34)])
def test_a_run_is_judged_at_a_third(steps: int, every: int, when: int) -> None:
    assert (evaluation_steps(steps), third(steps)) == (every, when)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ((), None),
        (GOOD[:2], None),  # before a third
        (((0, 5.0), (2, 4.9), (4, 4.4)), None),  # 0.6 of the rival's progress of 1
        (((0, 5.0), (2, 4.9), (4, 4.6)), "hopeless"),  # 0.4 of it
        (((0, 5.0), (2, 4.9), (4, 5.4)), "hopeless"),
        (((0, 5.0), (2, 4.9), (4, 4.4), (6, 4.9)), None),  # later it may stand still
        (((0, 5.0), (2, 9.0), (4, 4.4)), None),  # a warmup may overshoot
        (((0, 5.0), (2, 4.9), (4, 5.6)), "diverged"),
        (((0, 5.0), (2, 4.9), (4, 4.4), (12, 5.6)), "diverged"),
        (((0, 5.0), (2, math.nan)), "diverged"),
        (((0, 5.0), (2, math.inf), (4, 4.0)), "diverged"),
    ],
)
def test_why_a_run_stops(curve: tuple[tuple[int, float], ...], expected: str | None) -> None:
    assert why_ended(curve, 12, GOOD) == expected


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (((0, 5.0), (4, 9.0)), None),  # it may come back
        (((0, 5.0), (4, 9.0), (12, 4.0)), None),
        (((0, 5.0), (4, 4.0), (12, 5.6)), "diverged"),
        (((0, 5.0), (2, math.nan)), "diverged"),
    ],
)
def test_a_run_that_is_judged_diverges_at_its_end(curve: tuple[tuple[int, float], ...], expected: str | None) -> None:
    assert why_ended(curve, 12, judged=True) == expected


def test_without_a_rival_that_has_learnt_nothing_is_hopeless() -> None:
    slow = ((0, 5.0), (2, 5.0), (4, 5.0))
    assert why_ended(slow, 12) is None
    assert why_ended(slow, 12, ((0, 5.0), (4, 5.1))) is None
    assert why_ended(slow, 12, ((0, 5.0), (6, 1.0))) is None  # evaluated at other steps


def test_the_best_of_an_arm_never_stops() -> None:
    """Whatever the curves: a run is compared with others, and none is behind itself."""
    assert why_ended(GOOD, 12, GOOD) is None
    ahead = tuple((step, loss - 0.1 * bool(step)) for step, loss in GOOD)
    assert why_ended(ahead, 12, GOOD) is None


def test_the_best_rate_is_that_of_a_run_which_came_to_its_end() -> None:
    trials = [tried(1e-4, 4.0), tried(1e-3, 3.0, "hopeless"), tried(1e-2, 3.5), tried(3e-2, 3.5)]
    assert best_trial(trials) == trials[2]  # of equal ones the lower rate
    assert best_trial([tried(1e-3, 3.0, "diverged")]) is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-4: 4.0, 1e-3: 3.0, 1e-2: 3.5}, None),
        ({1e-4: 2.0, 1e-3: 3.0, 1e-2: 3.5}, 1e-5),
        ({1e-4: 4.0, 1e-3: 3.0, 1e-2: 2.5}, 1e-1),
        ({0.1: 4.0, 0.5: 3.0}, None),  # no rate is above 1
        ({1e-3: 3.0}, 1e-4),
    ],
)
def test_the_next_rate_outwards(losses: dict[float, float], expected: float | None) -> None:
    assert next_outward([tried(lr, loss) for lr, loss in losses.items()], 10.0) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [((4.0, 3.0, 3.5), 0), ((2.0, 3.0, 3.5), -1), ((4.0, 3.0, 2.5), 1), ((3.0,), -1), ((), 0)],
)
def test_where_the_best_rate_lies(losses: tuple[float, ...], expected: int) -> None:
    assert edge([tried(lr, loss) for lr, loss in zip((1e-3, 1e-2, 1e-1), losses, strict=False)]) == expected


def test_if_every_rate_has_diverged_a_lower_one_is_tried() -> None:
    assert next_outward([tried(1e-3, 9.0, "diverged"), tried(1e-2, 9.0, "diverged")], 10.0) == 1e-4
