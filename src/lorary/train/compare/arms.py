"""The arms of a comparison on its model: the same sites for all, and on request the same number of trained numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError, Diagnostic, LoraryError
from lorary.model.loading.from_pretrained import skeleton
from lorary.model.plan import Plan
from lorary.model.planning import has_common_targets
from lorary.train.compare.request import HEADLINE, Request, each_arm
from lorary.train.config.conflicts import contradictions
from lorary.train.runner.prepare import RunPlan
from lorary.train.runner.task_base import new_modules

_HIGHEST_RANK = 2**16


def fitted_arms(request: Request, run: RunPlan) -> Request:
    """The request with the ranks of its arms matched, if it asks for that, after a check that all can be trained.

    Args:
        request: the comparison.
        run: the plan of any arm's runs, for the model's class and the labels.

    Raises:
        ConfigError: arms that cannot be planned on this model, or adapt other layers than the rest; all reasons.
    """
    model = skeleton(request.config.model, run.base)

    def planned(arm: Arm) -> Plan:
        config = request.config_of(arm)
        if problems := contradictions(config.resolve()):
            raise ConfigError(HEADLINE, problems)
        return config.plan(model, None, new_modules(config, run.base, model))

    plans = dict(zip((arm.name for arm in request.arms), each_arm(request.arms, planned), strict=True))
    _check_sites(request, plans)
    if request.settings.match == "rank":
        return request
    wanted = request.settings.reference or request.arms[0].name
    target = plans[wanted].trainable
    arms = [arm if arm.name == wanted else _matched(arm, planned, target) for arm in request.arms]
    return dataclasses.replace(request, arms=tuple(arms))


def _check_sites(request: Request, plans: dict[str, Plan]) -> None:
    """Refuse arms that adapt other layers than the first one, unless they say targets of their own.

    Raises:
        ConfigError: every such arm.
    """
    common = [arm for arm in request.arms if has_common_targets(plans[arm.name].method)]
    chosen = [arm for arm in common if not arm.method.get("targets")]
    problems = []
    for arm in chosen[1:]:
        first, own = ({site.site.name for site in plans[one.name].sites} for one in (chosen[0], arm))
        if first != own:
            differing = sorted(first ^ own)
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            what = f"adapts {len(own)} layers, {chosen[0].name} {len(first)}: {', '.join(differing[:3])}{more} differ"
            fix = "set method.targets to layers that all can adapt, or give the arm targets of its own"
            problems.append(Diagnostic(arm.name, what, fix))
    if problems:
        raise ConfigError(HEADLINE, problems)


def _matched(arm: Arm, planned: Callable[[Arm], Plan], target: int) -> Arm:
    """The arm with the rank whose trained numbers are nearest to a target; unchanged if no rank changes them."""

    @cache
    def numbers(r: int) -> int | None:
        try:
            return planned(_with_rank(arm, r)).trainable
        except LoraryError:
            return None  # the method takes no rank, or not this one

    ranks = _around(numbers, target)
    found = [(abs(count - target), r) for r in ranks if (count := numbers(r)) is not None]
    return _with_rank(arm, min(found)[1]) if found and numbers(1) != numbers(2) else arm


def _around(numbers: Callable[[int], int | None], target: int) -> Sequence[int]:
    """The two neighbouring ranks around a target; one if it is beyond all ranks."""
    low, high = 1, 2
    while high <= _HIGHEST_RANK and (count := numbers(high)) is not None and count < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        count = numbers(middle)
        low, high = (low, middle) if count is None or count >= target else (middle, high)
    return low, high


def _with_rank(arm: Arm, r: int) -> Arm:
    method: dict[str, Any] = {**arm.method, "r": r}
    return dataclasses.replace(arm, method=method)
