"""How two methods are compared: as `lorary compare` does it, with its search and its statistics.

1. The rate is chosen among rungs of one ladder, on seeds and held-out windows that are never reported. Every method
   tries as many rungs; while the best one is the lowest or the highest tried, the next one is tried, too. Where to go
   on is decided by `lorary.train.compare.search`.
2. Runs with equal seeds see the same batches in the same order. What is reported is the difference of the means over
   the seeds, with the intervals of `lorary.analysis.comparison.over_seeds`.

Beyond `lorary compare`: figures other than a loss on rows, such as the steps to a loss; tasks
in turn, where the runs of both methods begin from one adapter, and are compared in pairs; means of two seeds to choose
a rate. The runs were made before there was `lorary compare`: they keep the mean loss over the held-out windows, not the
loss of each, so that the chance of the seeds counts alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, takewhile

from ledger import Ledger, Record
from training import TUNING_SEEDS, Arm, Size, run

from lorary.analysis.comparison.record import Trial
from lorary.train.compare.search import best_trial, edge

LADDER = (5e-5, 1.3e-4, 3.2e-4, 8e-4, 2e-3, 5e-3, 1.25e-2, 3.1e-2, 7.8e-2, 0.2)  # learning rates, 2.5 apart
MOST_RUNGS = 5
MOST_SEEDS = 20


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
        low, high = arm.first, arm.first + self.size.rungs - 1
        tried = [self._tried(arm, LADDER[rung], horizon) for rung in range(low, high + 1)]
        while len(tried) < MOST_RUNGS and (outward := edge(tried)):
            rung = low - 1 if outward < 0 else high + 1
            if not 0 <= rung < len(LADDER):
                break
            low, high = min(low, rung), max(high, rung)
            tried.append(self._tried(arm, LADDER[rung], horizon))
        best = best_trial(tried)
        return best.lr if best else LADDER[low]

    def _tried(self, arm: Arm, lr: float, horizon: int) -> Trial:
        """The runs at a rate as one of the search, with their mean loss."""
        runs = [self.record(arm, lr, seed) for seed in TUNING_SEEDS]
        losses = [loss_at(run, task, horizon) for run in runs for task in arm.watched]
        loss = sum(losses) / len(losses)
        ending = "finished" if math.isfinite(loss) else "diverged"
        return Trial(arm.name, lr, TUNING_SEEDS[0], horizon, ((horizon, loss),), ending)

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
