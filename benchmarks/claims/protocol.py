"""How two methods are compared: a learning rate tuned for each of them, then pairs of runs that differ in nothing else.

1. The rate is chosen among rungs of one ladder, on seeds and held-out windows that are never reported. Every method
   tries as many rungs; while the best one is the lowest or the highest tried, the next one is tried, too.
2. The runs of a pair see the same batches in the same order. What is reported is the mean of the paired differences
   and its 95 % interval, by Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from ledger import Ledger, Record
from training import TUNING_SEEDS, Arm, Size, run

LADDER = (5e-5, 1.3e-4, 3.2e-4, 8e-4, 2e-3, 5e-3, 1.25e-2, 3.1e-2, 7.8e-2, 0.2)  # learning rates, 2.5 apart
MOST_RUNGS = 5

# Student's t at 97.5 %, for 1 to 19 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
      2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip
MOST_SEEDS = len(_T) + 1


class Missing(Exception):  # noqa: N818 (nothing went wrong)
    """A run has not been made yet."""


@dataclass(frozen=True)
class Bench:
    """Runs what is not yet in the ledger."""

    ledger: Ledger
    size: Size
    reads: bool = False  # only: a run that is not there is Missing

    def record(self, arm: Arm, lr: float, seed: int) -> Record:
        """The run, from the ledger or made now."""
        key = self._key(arm, lr, seed)
        if key not in self.ledger.runs:
            if self.reads:
                raise Missing
            print(f"{arm.name}, lr {lr:g}, seed {seed} ...", flush=True)
            self.ledger.add(run(self, arm, lr, seed))
        return self.ledger.runs[key]

    def _key(self, arm: Arm, lr: float, seed: int) -> tuple[object, ...]:
        return (arm.name, lr, seed, arm.steps(self.size))

    def rate(self, arm: Arm, horizon: int) -> float:
        """The learning rate with the least held-out loss after `horizon` steps, over the tuning seeds and the tasks."""
        if arm.rate is not None or self.size.rungs == 1:
            return arm.rate or LADDER[arm.first]
        tried: dict[int, float] = {}
        new = list(range(arm.first, arm.first + self.size.rungs))
        while new:
            tried |= {rung: self._tuned(arm, LADDER[rung], horizon) for rung in new}
            best = min(tried, key=tried.__getitem__)
            new = [rung for rung in (best - 1, best + 1) if 0 <= rung < len(LADDER) and rung not in tried]
            if len(tried) >= MOST_RUNGS:
                break
        return LADDER[best]

    def _tuned(self, arm: Arm, lr: float, horizon: int) -> float:
        runs = [self.record(arm, lr, seed) for seed in TUNING_SEEDS]
        losses = [loss_at(run, task, horizon) for run in runs for task in arm.watched]
        return sum(losses) / len(losses)

    def runs(self, arm: Arm, horizon: int) -> list[Record]:
        """The runs that are reported, at the arm's own learning rate, one for each seed; reading, all there are."""
        lr = self.rate(arm, horizon)
        if self.reads:
            seeds = takewhile(lambda seed: self._key(arm, lr, seed) in self.ledger.runs, range(MOST_SEEDS))
            return [self.record(arm, lr, seed) for seed in range(max(self.size.seeds, len(list(seeds))))]
        return [self.record(arm, lr, seed) for seed in range(self.size.seeds)]


def loss_at(record: Record, task: str, step: float) -> float:
    """The loss after so many steps, between two evaluations on the straight line; inf once it is not finite."""
    points = [(s, math.inf if loss is None else loss) for s, loss in record["losses"][task]]
    for (s0, l0), (s1, l1) in pairwise(points):
        if s0 <= step <= s1:
            return l1 if step == s1 else l0 if step == s0 else l0 + (l1 - l0) * (step - s0) / (s1 - s0)
    raise ValueError(f"the run of {record['arm']} has no loss at step {step}")


def steps_to(record: Record, task: str, target: float, horizon: int) -> float:
    """Steps until the loss is `target`, between two evaluations on the straight line; `horizon` if not before."""
    points = [(s, math.inf if loss is None else loss) for s, loss in record["losses"][task] if s <= horizon]
    if points[0][1] <= target:
        return float(points[0][0])
    for (s0, l0), (s1, l1) in pairwise(points):
        if l1 <= target:
            return s0 + (s1 - s0) * (l0 - target) / (l0 - l1) if math.isfinite(l0) else float(s1)
    return float(horizon)


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean, and the half width of its 95 % interval."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def paired(method: Sequence[float], against: Sequence[float]) -> Difference:
    """method - against, pair by pair."""
    differences = [a - b for a, b in zip(method, against, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    return Difference(mean, _T[n - 2] * deviation / math.sqrt(n), n)
