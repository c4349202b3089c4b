"""What is dropped when a comparison does not fit into its budget, in which order, and what it is said to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError
from lorary.train.compare.budget import RESERVE, Forecast, fitted
from lorary.train.compare.request import Request
from lorary.train.compare.settings import Settings
from lorary.train.compare.timing import Timing
from lorary.train.config.load import from_dict

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FAST, SLOW = Timing(1.0, (0.5, 0.5), 1.0, 0), Timing(1.0, (2.0, 2.0), 1.0, 0)
FORECAST = Forecast({"lora": FAST, "dora": FAST, "full": SLOW}, steps=10, scored=2.0, workers=2)


def request(budget: float | None, **changes: Any) -> Request:
    arms = tuple(Arm(name, {"name": name}, RATES) for name in FORECAST.timings)
    config = from_dict({"model": "builtin:base", "data": "builtin:topics"})
    return Request(config, arms, Settings(budget=budget, seeds=3, **changes), Path("somewhere"), 10)


def kept(budget: float, **changes: Any) -> tuple[int, int, list[str], list[str]]:
    found, left_out = fitted(request(budget, **changes), FORECAST)
    assert FORECAST.whole(found) <= RESERVE * budget
    return found.settings.seeds, len(found.arms[0].rates), [arm.name for arm in found.arms], list(left_out)


def test_the_seconds_of_a_comparison() -> None:
    assert FORECAST.run("lora") == 1 + 10 * 0.5 + 7 * 1
    assert FORECAST.run("lora", judged=True) == FORECAST.run("lora") + 1 + 2 * 1
    runs = [5 * FORECAST.run(name) + 3 * FORECAST.run(name, True) for name in FORECAST.timings]
    costs = 2 * 3 * (1 + 6 * 0.5) + 3 * (1 + 6 * 2.0)
    assert FORECAST.whole(request(None)) == sum(runs) / 2 + costs


def test_without_a_budget_and_with_a_large_one_nothing_is_dropped() -> None:
    assert fitted(request(None), FORECAST) == (request(None), {})
    assert kept(1000.0) == (3, 5, ["lora", "dora", "full"], [])


THIRD, SECOND = "seed 3 of every arm", "seed 2 of every arm"
OUTER = ["the outer ones of 5 rates of every arm", "the outer ones of 3 rates of every arm"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (320.0, (2, 5, ["lora", "dora", "full"], [THIRD])),
        (250.0, (2, 3, ["lora", "dora", "full"], [THIRD, OUTER[0]])),
        (171.0, (2, 1, ["lora", "dora", "full"], [THIRD, *OUTER])),
        (100.0, (2, 1, ["lora", "dora"], [THIRD, *OUTER, "full"])),
        (40.0, (2, 1, ["lora"], [THIRD, *OUTER, "full", "dora"])),
        (35.0, (1, 1, ["lora"], [THIRD, *OUTER, "full", "dora", SECOND])),
    ],
)
def test_without_two_seeds_there_is_no_verdict_and_the_second_goes_last(budget: float, expected: Any) -> None:
    assert kept(budget) == expected


def test_the_reference_is_never_dropped() -> None:
    assert kept(80.0, reference="full")[2] == ["full"]


def test_the_same_rates_are_left_for_every_arm() -> None:
    found, _ = fitted(request(171.0), FORECAST)
    assert {arm.rates for arm in found.arms} == {(1e-3,)}


def test_an_arm_with_two_rates_keeps_one() -> None:
    one = request(171.0)
    one = dataclasses.replace(one, arms=(dataclasses.replace(one.arms[0], rates=(1e-4, 1e-3)), *one.arms[1:]))
    found, _ = fitted(one, FORECAST)
    assert [len(arm.rates) for arm in found.arms] == [1, 1, 1]


def test_a_budget_in_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        fitted(request(5.0), FORECAST)
    assert str(error.value) == (
        "cannot compare:\n"
        "  - budget: one rate and one seed of lora alone take about 26 s, the budget is 5 s\n"
        "      hint: give it 30 s or more, or fewer training.max_steps"
    )
