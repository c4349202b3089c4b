"""Differences of figures that a run has one of, such as the steps to a loss: the chance of the seeds alone.

Where a figure cannot be taken row by row, test rows cannot be resampled. What remains is how much it changes from seed
to seed, pooled over the arms as for everything else of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lorary.analysis.comparison._chance import LEVEL, Measured
from lorary.analysis.comparison.statistics import Difference, interval, judged
from lorary.errors import DataError, Diagnostic, did_you_mean

Figures = Mapping[str, Sequence[float]]
Pairs = Sequence[tuple[str, str]]


def differences_over_seeds(
    figures: Figures, pairs: Pairs, *, paired: bool = False
) -> dict[tuple[str, str], Difference]:
    """The differences of arms in a lower-is-better figure, with intervals and verdicts.

    Args:
        figures: arm -> the figure of its run with each seed.
        pairs: (arm, reference); their joint intervals hold together.
        paired: whether runs with equal seeds have more in common than their order of the data, such as the adapter
            that both begin from. Then every pair stands on the variance of its own differences, seed by seed, and the
            joint intervals are Bonferroni's.

    Returns:
        pair -> its difference, "not judged" if no arm has two seeds.

    Raises:
        DataError: a figure is missing or not finite, a pair names an arm that has none, or paired arms have unequally
            many; with every reason.
    """
    if problems := [*_problems(figures, pairs, paired)]:
        raise DataError("cannot compare figures of runs:", problems)
    if paired:
        return {pair: _paired(figures, pair, len(pairs)) for pair in pairs}
    measured = _measured(figures)
    factor = measured.joint_factor(pairs)
    return {
        pair: judged(
            pair, interval(measured, *pair), interval(measured, *pair, factor), measured.why_no_interval(*pair)
        )
        for pair in pairs
    }


def _paired(figures: Figures, pair: tuple[str, str], together: int) -> Difference:
    """The mean of the differences seed by seed."""
    arm, other = pair
    measured = _measured({arm: [a - b for a, b in zip(figures[arm], figures[other], strict=True)]})
    half = measured.half_width(arm)
    joint = measured.half_width(arm, level=1 - (1 - LEVEL) / together)
    factor = joint / half if half > 0 else 1.0
    same = "" if half != 0 else "it is the same with every seed, so its chance is unknown"
    why = measured.why_no_interval(arm) or same
    return judged(pair, interval(measured, arm), interval(measured, arm, None, factor), why)


def _measured(figures: Figures) -> Measured:
    columns = {arm: np.array(of, dtype=np.float64)[:, None] for arm, of in figures.items()}  # [seeds, 1]
    return Measured(columns, np.ones(1), rows_count=False)


def _problems(figures: Figures, pairs: Pairs, paired: bool) -> Iterator[Diagnostic]:
    for arm, of in figures.items():
        if not arm:
            yield Diagnostic("figures", "an arm has an empty name", "name it")
        elif not len(of):
            yield Diagnostic(arm, "has no figures", "give one for each seed")
        elif bad := [value for value in of if not math.isfinite(value)]:
            yield Diagnostic(arm, f"has the figure {bad[0]}", "leave out runs that have diverged, and say so")
    for arm, other in pairs:
        unknown = [name for name in (arm, other) if name not in figures]
        for name in unknown:
            yield Diagnostic("pairs", f"there are no figures of {name!r}", did_you_mean(name, figures))
        if not unknown and paired and len(figures[arm]) != len(figures[other]):
            what = f"has {len(figures[arm])} figures, and {other} {len(figures[other])}"
            yield Diagnostic(arm, what, "pair runs with equal seeds")
        if arm == other:
            yield Diagnostic("pairs", f"{arm!r} is compared with itself", "name two arms")
