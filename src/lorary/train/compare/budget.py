"""The time of a comparison: what its parts will take, and what is dropped so that it fits into a budget.

    search      every rate of every arm, one run each
    judgement   the best rate of every arm, one run for each seed, and its scores
    costs       the short runs in turns in which steps are timed, in one process

Dropped are whole things, in this order, until the rest fits: further seeds, down to two; outer rates, the same for
every arm; arms, the last one first and never the reference; and the second seed. Without it there is no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError, Diagnostic
from lorary.train.compare.request import HEADLINE, Request
from lorary.train.compare.search import EVALUATIONS
from lorary.train.compare.timing import UNTIMED, Timing

RESERVE = 0.9  # the share of a budget that is planned for; outward rates and delays take the rest
TURNS, TIMED = 3, 4  # short runs of every arm, and their timed steps


@dataclass(frozen=True)
class Forecast:
    """The seconds that the parts of a comparison take.

    Args:
        timings: name of an arm -> its first steps.
        steps: of a run.
        scored: rows that a judged run is scored on, over those of one evaluation in its training.
        workers: runs at the same time.
    """

    timings: Mapping[str, Timing]
    steps: int
    scored: float
    workers: int

    def run(self, arm: str, judged: bool = False) -> float:
        """Seconds of one run."""
        one = self.timings[arm]
        scores = one.setup + self.scored * one.evaluation if judged else 0.0
        return one.setup + self.steps * one.step + (1 + EVALUATIONS) * one.evaluation + scores

    def whole(self, request: Request) -> float:
        """Seconds of the whole comparison, without outward rates."""
        seeds = request.settings.seeds
        runs = (len(arm.rates) * self.run(arm.name) + seeds * self.run(arm.name, True) for arm in request.arms)
        return sum(runs) / self.workers + sum(self._costs(arm.name) for arm in request.arms)

    def _costs(self, arm: str) -> float:
        one = self.timings[arm]
        return TURNS * (one.setup + (UNTIMED + TIMED) * one.step)


def fitted(request: Request, forecast: Forecast) -> tuple[Request, dict[str, str]]:
    """The largest part of a comparison that fits into its budget, and why the rest was left out.

    Raises:
        ConfigError: not even its smallest part does.
    """
    budget = request.settings.budget
    if budget is None or forecast.whole(request) <= RESERVE * budget:
        return request, {}
    left_out: dict[str, str] = {}
    for smaller, what in _smaller(request):
        left_out[what] = (
            f"the whole comparison takes about {forecast.whole(request):.0f} s, the budget is {budget:.0f} s"
        )
        if forecast.whole(smaller) <= RESERVE * budget:
            return smaller, left_out
    least = forecast.whole([request, *(part for part, _ in _smaller(request))][-1])
    what = (
        f"one rate and one seed of {_reference(request)} alone take about {least:.0f} s, the budget is {budget:.0f} s"
    )
    fix = f"give it {math.ceil(least / RESERVE)} s or more, or fewer training.max_steps"
    raise ConfigError(HEADLINE, [Diagnostic("budget", what, fix)])


def _smaller(request: Request) -> Iterator[tuple[Request, str]]:
    """The request with one thing dropped after another; each with the name of what was dropped last."""
    for seeds in range(request.settings.seeds - 1, 1, -1):
        request = replace(request, settings=replace(request.settings, seeds=seeds))
        yield request, f"seed {seeds + 1} of every arm"
    while any(len(arm.rates) > 1 for arm in request.arms):
        shorter = tuple(replace(arm, rates=_inner(arm)) for arm in request.arms)
        dropped = max(len(arm.rates) for arm in request.arms)
        request = replace(request, arms=shorter)
        yield request, f"the outer ones of {dropped} rates of every arm"
    for arm in reversed(request.arms):
        if arm.name != _reference(request):
            request = replace(request, arms=tuple(one for one in request.arms if one.name != arm.name))
            yield request, arm.name
    if request.settings.seeds > 1:
        yield replace(request, settings=replace(request.settings, seeds=1)), "seed 2 of every arm"


def _inner(arm: Arm) -> tuple[float, ...]:
    """The rates without the lowest and the highest; the one in the middle is left at least."""
    middle = len(arm.rates) // 2
    return arm.rates[1:-1] if len(arm.rates) > 2 else arm.rates[middle : middle + 1]


def _reference(request: Request) -> str:
    names = [arm.name for arm in request.arms]  # one whose first steps failed is not among them
    return request.settings.reference if request.settings.reference in names else names[0]
