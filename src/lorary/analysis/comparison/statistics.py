"""The statistics of a comparison: differences of methods on the same test rows, their intervals, and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorary.analysis.comparison.record import Comparison

Verdict = Literal["better", "worse", "no difference shown", "not judged"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; without one (too few rows or seeds) the ends are not a number."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The paired difference of two arms' test losses; below zero, the arm is better.

    Args:
        arm, reference: names.
        loss: the arm's loss minus the reference's, in nats per token, with its interval.
        verdict: in words.
        why: why nothing was judged; else empty.
    """

    arm: str
    reference: str
    loss: Interval
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Standing:
    """An arm at its best rate.

    Args:
        arm: its name.
        lr: the rate chosen on the validation rows; None if no run of it ended.
        seeds: number of runs that were judged on the test rows.
        untuned: why its rate is "not tuned"; empty if it lies between two rates that were tried.
        loss: on the test rows; None if it was not judged.
        accuracy: likewise.
        forgotten: loss on general text minus the base's; None if it was not measured.
        spread: standard deviation of the test loss over its seeds; not a number of a single one.
    """

    arm: str
    lr: float | None
    seeds: int
    untuned: str
    loss: Interval | None = None
    accuracy: Interval | None = None
    forgotten: Interval | None = None
    spread: float = float("nan")


@dataclass(frozen=True)
class Findings:
    """The results of a comparison.

    Args:
        comparison: its record.
        reference: name of the arm that the others are compared with.
        best: name of the arm with the lowest test loss; empty if none was judged.
        standings: arms, the lowest test loss first, those that were not judged last.
        against_reference: arm -> its difference from the reference.
        against_best: arm -> its difference from the best.
        verdict: the result in one plain sentence.
    """

    comparison: Comparison
    reference: str
    best: str
    standings: tuple[Standing, ...]
    against_reference: dict[str, Difference]
    against_best: dict[str, Difference]
    verdict: str


def findings(comparison: Comparison, reference: str | None = None) -> Findings:
    """The differences between the arms of a comparison, and verdicts.

    Args:
        comparison: its record.
        reference: name of an arm; by default the first one.

    Raises:
        DataError: there is no such arm, or the runs' rows cannot be paired.
    """
    raise NotImplementedError
