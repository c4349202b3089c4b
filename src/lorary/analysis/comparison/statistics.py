"""The results of a comparison: differences of methods on the same test rows, with intervals, and verdicts.

An arm is judged at its best rate, by the mean of its runs with several seeds. Language models are judged by the loss
per token, classifiers by their accuracy. Each difference has two intervals. The one of the *pair* holds the true
difference in 95 % of comparisons. Verdicts are given by the wider *joint* one: in 95 % of comparisons the intervals of
all pairs of methods hold together (as in Tukey's test), so that the number of methods does not make a method win, and
the best one, which is chosen by the same rows, is no exception.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from lorary.analysis.comparison._chance import BASE, Measured
from lorary.analysis.comparison.record import Comparison, Scores, Trial
from lorary.errors import DataError, Diagnostic, did_you_mean

Verdict = Literal["better", "worse", "no difference shown", "not judged"]
Measure = Literal["loss", "accuracy"]
_RULE_OF_THREE = 3  # none of n rows: less than 3/n of all rows, with 95 % (Hanley & Lippman-Hand 1983, JAMA 249:1743)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, whose ends are NaN if the chance in it is unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Difference:
    """The paired difference of two arms on the test rows.

    Args:
        arm, reference: names.
        pair: the arm's measure minus the reference's, with the 95 % interval of this pair.
        joint: the same with the interval that holds together with all others; it gives the verdict.
        verdict: on the arm.
        why: why nothing was judged; else empty.
    """

    arm: str
    reference: str
    pair: Interval
    joint: Interval
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """An arm at its best rate.

    Args:
        arm: its name.
        lr: the rate chosen on the validation rows; None if no run of it ended.
        seeds: number of runs that were judged on the test rows.
        diverged: number of runs with other seeds that diverged at this rate; the measures are those of the rest.
        untuned: why its rate counts as "not tuned"; empty if the best rate lies between two others.
        loss: on the test rows, in nats per token; None if it was not judged.
        accuracy: likewise, as a share.
        forgotten: loss on general text minus the base's; None if it was not measured.
        spread: standard deviation of the test loss over its seeds; NaN with a single one.
    """

    arm: str
    lr: float | None
    seeds: int
    untuned: str
    loss: Interval | None = None
    accuracy: Interval | None = None
    forgotten: Interval | None = None
    spread: float = math.nan
    diverged: int = 0


@dataclass(frozen=True)
class Findings:
    """The results of a comparison.

    Args:
        comparison: its record.
        measure: what the verdicts are about.
        reference: name of the arm that the others are compared with; empty if it was not judged.
        best: name of the arm with the best measure, of those without a diverged seed unless all have one; empty if none
            was judged.
        standings: arms, the best first; then those with a seed that diverged; those that were not judged last.
        base: the test loss without an adapter, over the rows alone; None if it was not measured.
        against_reference: arm -> its difference from the reference.
        against_best: arm -> its difference from the best.
    """

    comparison: Comparison
    measure: Measure
    reference: str
    best: str
    standings: tuple[Standing, ...]
    base: float | None
    against_reference: Mapping[str, Difference]
    against_best: Mapping[str, Difference]


def findings(comparison: Comparison, reference: str | None = None) -> Findings:
    """The differences between the arms of a comparison, and verdicts.

    Args:
        comparison: its record.
        reference: name of an arm; by default the first one.

    Raises:
        DataError: there is no such arm, or the runs were not scored on the same rows; with every reason.
    """
    names = [arm.name for arm in comparison.arms]
    if reference is not None and reference not in names:
        fix = did_you_mean(reference, names)
        raise DataError("cannot compare:", [Diagnostic("reference", f"there is no method {reference!r}", fix)])
    judged = {name: runs for name in names if (runs := judged_runs(comparison, name))}
    _check_rows(comparison, judged)
    measure: Measure = "accuracy" if comparison.task == "classification" else "loss"
    tests: dict[Measure, Measured] = {
        which: _measured({arm: [run.test for run in runs] for arm, runs in judged.items()}, comparison.base_test, which)
        for which in (("loss", "accuracy") if judged else ())
    }
    general = _general(comparison, judged)
    standings = {name: _standing(comparison, name, tests if name in judged else {}, general) for name in names}
    sign = -1 if measure == "accuracy" else 1
    order = sorted(judged, key=lambda arm: (standings[arm].diverged > 0, sign * tests[measure].value(arm)))
    reference = reference or (names[0] if names else "")
    reference = reference if reference in judged else ""
    best = order[0] if order else ""
    factor = tests[measure].joint_factor([*combinations(order, 2)]) if order else 1.0
    against = {
        other: {
            arm: _difference(tests, measure, standings[arm], standings[other], factor)
            for arm in order
            if other and arm != other
        }
        for other in (reference, best)
    }
    return Findings(
        comparison,
        measure,
        reference,
        best,
        tuple(standings[name] for name in dict.fromkeys((*order, *names))),
        comparison.base_test.loss if comparison.base_test else None,
        against[reference],
        against[best],
    )


def chosen_rate(comparison: Comparison, arm: str) -> float | None:
    """The learning rate with the lowest validation loss; among the rates that were judged, if there are any."""
    runs = [run for run in comparison.of(arm) if run.ending == "finished" and run.curve]
    runs = [run for run in runs if run.test is not None] or runs
    losses: dict[float, list[float]] = {}
    for run in runs:
        losses.setdefault(run.lr, []).append(run.curve[-1][1])
    means = {lr: sum(of) / len(of) for lr, of in losses.items()}
    finite = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda lr: (finite[lr], lr)) if finite else None


def judged_runs(comparison: Comparison, arm: str) -> list[Trial]:
    """The runs of an arm, at its best rate, that have finite scores on the test rows."""
    lr = chosen_rate(comparison, arm)
    return [run for run in comparison.of(arm) if run.lr == lr and run.test is not None and _finite(run.test)]


def diverged_runs(comparison: Comparison, arm: str) -> list[Trial]:
    """The judged runs of an arm that diverged, at a rate that had not diverged in the search."""
    lr = chosen_rate(comparison, arm)
    return [run for run in comparison.of(arm) if run.lr == lr and run.ending == "diverged"]


def why_untuned(comparison: Comparison, arm: str) -> str:
    """Why the best rate of an arm may not be the best: no rate was tried below it, or above it."""
    lr = chosen_rate(comparison, arm)
    tried = sorted({run.lr for run in comparison.of(arm)})
    if lr is None:
        return "no run of it finished" if tried else "it was not run"
    if len(tried) == 1:
        return f"{lr:.2g} is the only rate that was tried"
    edge = "lowest" if lr == tried[0] else "highest" if lr == tried[-1] else ""
    return f"its best rate, {lr:.2g}, is the {edge} that was tried" if edge else ""


def _standing(
    comparison: Comparison, arm: str, tests: Mapping[Measure, Measured], general: Measured | None
) -> Standing:
    lr, untuned = chosen_rate(comparison, arm), why_untuned(comparison, arm)
    diverged = len(diverged_runs(comparison, arm))
    if not tests:
        return Standing(arm, lr, 0, untuned, diverged=diverged)
    seeds = tests["loss"].seeds[arm]
    forgotten = interval(general, arm, BASE) if general is not None and arm in general.seeds else None
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else math.nan
    accuracy = interval(tests["accuracy"], arm, at_least=_RULE_OF_THREE / tests["accuracy"].rows)
    accuracy = Interval(accuracy.value, max(0.0, accuracy.low), min(1.0, accuracy.high))
    loss = interval(tests["loss"], arm)
    loss = Interval(loss.value, max(loss.low, 0.0), loss.high)
    return Standing(arm, lr, len(seeds), untuned, loss, accuracy, forgotten, spread, diverged)


def _difference(
    tests: Mapping[Measure, Measured], measure: Measure, one: Standing, reference: Standing, factor: float
) -> Difference:
    """The difference of a pair, whose joint interval is wider by a factor."""
    test, arm, other = tests[measure], one.arm, reference.arm
    at_least = _RULE_OF_THREE / test.rows if measure == "accuracy" else 0.0
    pair, joint = (interval(test, arm, other, wider, wider * at_least) for wider in (1.0, factor))
    why = test.why_no_interval(arm, other)
    return _if_stable(judged((arm, other), pair, joint, why, measure == "accuracy"), one, reference)


def _if_stable(d: Difference, one: Standing, reference: Standing) -> Difference:
    """The difference, not judged if seeds that diverged may have changed the verdict.

    An arm that diverged with some seeds is worse than the others say, so the only verdict that stands is against it.
    """
    unstable = [s for s, against in ((one, "worse"), (reference, "better")) if s.diverged and d.verdict != against]
    if d.verdict == "not judged" or not unstable:
        return d
    why = " and ".join(f"{s.diverged} of {s.seeds + s.diverged} seeds of {s.arm} diverged" for s in unstable)
    return replace(d, verdict="not judged", why=why)


def judged(
    arms: tuple[str, str], pair: Interval, joint: Interval, why: str = "", more_is_better: bool = False
) -> Difference:
    """The difference of an arm from a reference, with the verdict of its joint interval.

    Args:
        arms: (arm, reference).
        pair: the difference with its interval.
        joint: the difference with its joint interval.
        why: why it cannot be judged; empty if it can.
        more_is_better: whether a positive difference speaks for the arm.
    """
    better = joint.low > 0 if more_is_better else joint.high < 0
    verdict: Verdict = "no difference shown" if joint.low <= 0 <= joint.high else "better" if better else "worse"
    return Difference(*arms, pair, joint, "not judged" if why else verdict, why)


def interval(
    measured: Measured, arm: str, other: str | None = None, factor: float = 1.0, at_least: float = 0.0
) -> Interval:
    """The value of an arm, or its difference from another one, with its 95 % interval times a factor."""
    value, half = measured.value(arm, other), factor * measured.half_width(arm, other)
    half = max(half, at_least)  # NaN stays NaN: it is the first
    return Interval(value, value - half, value + half)


def _measured(scores: Mapping[str, list[Scores | None]], base: Scores | None, measure: Measure) -> Measured:
    tables = {arm: [s for s in of if s is not None] for arm, of in scores.items()}
    tokens = next(iter(tables.values()))[0].tokens
    tables |= {BASE: [base]} if base is not None and _finite(base) else {}
    field = "right" if measure == "accuracy" else "nats"
    sums = {arm: np.array([getattr(s, field) for s in of], dtype=np.float64) for arm, of in tables.items()}
    return Measured(sums, np.array(tokens, dtype=np.float64))


def _general(comparison: Comparison, judged: Mapping[str, list[Trial]]) -> Measured | None:
    scores = {arm: [run.general for run in runs if run.general is not None] for arm, runs in judged.items()}
    scores = {arm: found for arm, of in scores.items() if (found := [s for s in of if _finite(s)])}
    if not scores or comparison.base_general is None or not _finite(comparison.base_general):
        return None
    return _measured({arm: [*of] for arm, of in scores.items()}, comparison.base_general, "loss")


def _check_rows(comparison: Comparison, judged: Mapping[str, list[Trial]]) -> None:
    problems = []
    for field, base in (("test", comparison.base_test), ("general", comparison.base_general)):
        first: tuple[str, tuple[int, ...]] | None = ("the base", base.tokens) if base else None
        for arm, runs in judged.items():
            for run in runs:
                if (scores := getattr(run, field)) is None:
                    continue
                where = f"{arm}, seed {run.seed}"
                first = first or (where, scores.tokens)
                if scores.tokens != first[1]:
                    what = f"{_rows(scores.tokens)} of {field} text, and {first[0]} on {_rows(first[1])}"
                    problems.append(Diagnostic(where, f"was scored on {what}", "run this comparison again"))
    if problems:
        raise DataError("cannot compare runs that were not scored on the same rows:", problems)


def _rows(tokens: tuple[int, ...]) -> str:
    return f"{len(tokens):,} rows with {sum(tokens):,} tokens"


def _finite(scores: Scores) -> bool:
    return bool(scores.tokens) and all(map(math.isfinite, scores.nats))
