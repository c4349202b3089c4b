"""Two sources of chance in a measurement of trained models: the rows it was made on, and the seeds of the training.

The error of each arm's mean is drawn `DRAWS` times, the errors of all arms together, so that the error of a difference
is a difference of errors:

- *Rows* are resampled with replacement, the same ones for all arms (the paired bootstrap; Efron & Tibshirani 1993, An
  Introduction to the Bootstrap, chapter 6). A loss per token is a ratio of sums, and is computed as one.
- *Seeds* are two or three, too few to resample: their means are taken as normal, with the variance within the arms
  pooled over all arms as in the analysis of variance, and its own error counted by Student's t. Seeds of different
  arms are not paired. An arm that scatters clearly more than the others (a variance ratio beyond the 99 % point of F)
  is left out of the pool and stands on its own variance.

Simulated with planted noise of rows and seeds (`benchmarks/intervals.py`), the 95 % interval of a pair holds the true
difference in 95 to 99 % of comparisons at 2 and at 3 seeds; where the true spreads over the seeds mostly differ by a
factor of 2, in 89 to 99 %. The weak point is a method that scatters ten times as much as the others: its two or three
seeds may lie close together by chance, and then its interval is too narrow (84 to 93 %; Welch's 90 to 93 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 20_000
LEVEL = 0.95
BASE = ""  # the name of the base among the arms: it has rows, and no seeds
_STANDS_OUT = 0.99  # quantile of F
_AT_ONCE = 4_000_000  # resampled rows


@dataclass(frozen=True)
class Scatter:
    """The variance of a measurement over the seeds of an arm, and its degrees of freedom.

    Args:
        variance: of one seed's measurement.
        freedom: degrees of freedom of this variance.
        pooled: whether it is the variance within all arms.
    """

    variance: float
    freedom: int
    pooled: bool


class Measured:
    """One measurement, such as the loss, of several arms on the same rows.

    Args:
        sums: arm -> the measurement's sums [seeds, rows]; `BASE`, if given, is the model without an adapter.
        tokens: [rows], the same for all.
        rows_count: whether the chance of the rows counts; if not, that of the seeds does alone.
    """

    def __init__(self, sums: Mapping[str, Floats], tokens: Floats, rows_count: bool = True) -> None:
        self.rows, self.rows_count = len(tokens), rows_count
        self.seeds = {arm: table.sum(1) / tokens.sum() for arm, table in sums.items()}
        trained = {arm: seeds for arm, seeds in self.seeds.items() if arm != BASE}
        several = {arm: table for arm, table in sums.items() if len(table) > 1}
        by_rows = {
            arm: float(table.var(0, ddof=1).sum() / tokens.sum() ** 2) if rows_count else 0.0
            for arm, table in several.items()
        }
        self.scatter = scatters(trained, by_rows)
        generator = np.random.default_rng(0)  # the same rows for every measurement: they stay paired
        self._errors = _row_errors({arm: table.mean(0) for arm, table in sums.items()}, tokens, generator)
        pooled = {s.freedom: _scale(s.freedom, generator) for s in self.scatter.values() if s.pooled}
        for arm, scatter in self.scatter.items():
            scale = pooled[scatter.freedom] if scatter.pooled else _scale(scatter.freedom, generator)
            deviation = np.sqrt(scatter.variance / len(self.seeds[arm]))
            self._errors[arm] += deviation * generator.standard_normal(DRAWS) / scale

    def value(self, arm: str, other: str | None = None) -> float:
        """The mean over the seeds, minus another arm's."""
        return float(self.seeds[arm].mean() - (0.0 if other is None else self.seeds[other].mean()))

    def why_no_interval(self, *arms: str) -> str:
        """Why the chance in arms is unknown; empty if it is known."""
        if self.rows < 2 and self.rows_count:
            return "there is a single test row"
        if any(arm != BASE and arm not in self.scatter for arm in arms):
            return "no method has two seeds, so that their part in the difference is unknown"
        return ""

    def half_width(self, arm: str, other: str | None = None, level: float = LEVEL) -> float:
        """Half of the interval that is centred on the value; NaN if the chance in it is unknown."""
        if self.why_no_interval(arm, *([] if other is None else [other])):
            return float("nan")
        return float(np.quantile(np.abs(self._error(arm, other)), level))

    def joint_factor(self, pairs: Sequence[tuple[str, str]]) -> float:
        """The factor by which the intervals of pairs must grow, so that all of them hold together with 95 %.

        The quantile of the largest error in units of its interval ("maximum t"; Westfall & Young 1993). For all pairs
        of equal arms that is Tukey's interval.
        """
        worst = np.zeros(DRAWS)
        for arm, other in pairs:
            if (half := self.half_width(arm, other)) > 0:
                np.maximum(worst, np.abs(self._error(arm, other)) / half, out=worst)
        return max(1.0, float(np.quantile(worst, LEVEL)))

    def _error(self, arm: str, other: str | None) -> Floats:
        return self._errors[arm] - (0.0 if other is None else self._errors[other])


def scatters(seeds: Mapping[str, Floats], at_least: Mapping[str, float]) -> dict[str, Scatter]:
    """The variance over seeds that applies to each arm; empty if no arm has two seeds.

    Args:
        seeds: arm -> its measurement with each seed.
        at_least: arm -> the variance that would be expected if the seeds changed single rows alone.
    """
    several = {arm: (float(values.var(ddof=1)), len(values) - 1) for arm, values in seeds.items() if len(values) > 1}
    if not several:
        return {}
    apart = {arm for arm in several if _stands_out(arm, several, at_least[arm])}
    kept = [several[arm] for arm in several if arm not in apart]
    freedom = sum(d for _, d in kept)
    pooled = Scatter(sum(v * d for v, d in kept) / freedom, freedom, True)
    return {arm: Scatter(*several[arm], False) if arm in apart else pooled for arm in seeds}


def _stands_out(arm: str, several: Mapping[str, tuple[float, int]], at_least: float) -> bool:
    """Whether an arm's variance is clearly larger than the others' typical one.

    The typical one is their median, so that two arms with a large scatter do not hide behind each other.
    """
    variance, freedom = several[arm]
    # a variance over few seeds is skewed: its median by Wilson & Hilferty 1931
    others = [(v / (1 - 2 / (9 * d)) ** 3, d) for name, (v, d) in several.items() if name != arm]
    if not others:
        return False
    typical = max(at_least, float(np.median([v for v, _ in others])))
    return variance > typical * _largest_ratio(freedom, sum(d for _, d in others))


@cache
def _largest_ratio(freedom: int, of_others: int) -> float:
    """The 99 % point of F."""
    generator = np.random.default_rng(0)
    above, below = (generator.chisquare(d, DRAWS) / d for d in (freedom, of_others))
    return float(np.quantile(above / below, _STANDS_OUT))


def _row_errors(sums: Mapping[str, Floats], tokens: Floats, generator: np.random.Generator) -> dict[str, Floats]:
    """What resampled rows add to each arm's mean [draws]."""
    rows = len(tokens)
    table = np.stack([*sums.values(), tokens], 1)  # [rows, arms + 1]
    drawn = []
    for start in range(0, DRAWS, chunk := max(1, _AT_ONCE // rows)):
        count = min(chunk, DRAWS - start)
        picked = generator.integers(rows, size=(count, rows)) + np.arange(count)[:, None] * rows
        drawn.append(np.bincount(picked.ravel(), minlength=count * rows).reshape(count, rows) @ table)
    totals = np.concatenate(drawn)  # [draws, arms + 1]
    means = totals[:, :-1] / totals[:, -1:] - table[:, :-1].sum(0) / tokens.sum()
    means *= np.sqrt(rows / max(1, rows - 1))  # resampling has the variance with n, not n - 1, below the line
    return dict(zip(sums, means.T.copy(), strict=True))


def _scale(freedom: int, generator: np.random.Generator) -> Floats:
    """An estimated standard deviation over the true one: a normal error divided by it is Student's t."""
    return np.sqrt(generator.chisquare(freedom, DRAWS) / freedom)
