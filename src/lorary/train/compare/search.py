"""The search for a method's learning rate: the rates tried, the rule that stops hopeless ones, the best one.

Every rule is a function of the recorded losses on the validation rows alone, so that a comparison that is killed and
started again decides as it did before, and as one that is never killed.

    rates       the centre, then the others around it; while the best is the lowest or highest, one more outwards
    diverged    a loss that is not finite; or, from a third of the steps on, more than 1.1 times the loss at step 0
    hopeless    at a third of the steps less than half of the progress that the best earlier rate of the same method had
                made there and still had at its end, counted from the loss at step 0: such a rate stops there. The
                first one has no rival, and runs to its end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from lorary.analysis.comparison.record import Arm, Ending, Trial

EVALUATIONS = 6  # in a run, after step 0
DIVERGED = 1.1  # times the loss at step 0
HOPELESS = 0.5  # of the progress of the best rate
HIGHEST = 1.0  # the highest learning rate of a configuration

Curve = Sequence[tuple[int, float]]


def ladder(centre: float, rates: int, spacing: float) -> tuple[float, ...]:
    """Learning rates around a centre, rising, none above `HIGHEST`."""
    half = rates // 2
    found = (_rounded(centre * spacing**k, spacing) for k in range(-half, rates - half))
    return tuple(rate for rate in found if rate <= HIGHEST)


def centre_of(arm: Arm) -> float:
    """The rate that is tried first: the one in the middle."""
    return arm.rates[len(arm.rates) // 2]


def evaluation_steps(steps: int) -> int:
    """Optimizer steps from one evaluation to the next: two of them are a third of the run."""
    return max(1, math.ceil(steps / EVALUATIONS))


def third(steps: int) -> int:
    """The step at which rates are judged hopeless."""
    return min(steps, 2 * evaluation_steps(steps))


def init_seed(arm: str, seed: int) -> int:
    """The seed of the initialisation and dropout of a run: of its own for every arm, whichever others there are.

    Two arms that began alike would differ by less than two runs of one method do, and the chance of the seeds could not
    be told from their scatter.

    Args:
        arm: name of the arm.
        seed: of the order of the rows, which all arms have in common.
    """
    return int.from_bytes(hashlib.sha256(f"init/{seed}/{arm}".encode()).digest()[:4], "big")


def why_ended(curve: Curve, steps: int, rival: Curve = ()) -> Ending | None:
    """Why a run stops before its last step; None if it goes on.

    Args:
        curve: (step, validation loss) of the run so far, from step 0 on.
        steps: of a whole run.
        rival: the curve of the best earlier rate of the same arm; empty: there is none.
    """
    if not curve:
        return None
    start, when = curve[0][1], third(steps)
    for step, loss in curve:
        if not math.isfinite(loss) or (step >= when and loss > DIVERGED * start):
            return "diverged"
        if step == when and step < steps and _is_hopeless(start - loss, dict(rival), when):
            return "hopeless"
    return None


def _is_hopeless(progress: float, rival: dict[int, float], when: int) -> bool:
    if 0 not in rival or when not in rival:
        return False
    best = rival[0] - max(rival[when], rival[max(rival)])  # what was lost again counts for nothing
    return best > 0 and progress < HOPELESS * best


def is_finite(curve: Curve) -> bool:
    """Whether every loss of a run is a number."""
    return all(math.isfinite(loss) for _, loss in curve)


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """The run of a search with the lowest validation loss at its end; None if none came to its end."""
    finished = [trial for trial in trials if trial.ending == "finished" and trial.curve]
    return min(finished, key=lambda trial: (trial.curve[-1][1], trial.lr), default=None)


def edge(trials: Sequence[Trial]) -> int:
    """Where the best rate lies: -1 at the lowest that was tried, 1 at the highest, 0 between two others or untried.

    If every rate has diverged, a lower one may be better: -1.
    """
    rates, best = sorted({trial.lr for trial in trials}), best_trial(trials)
    if not rates:
        return 0
    return -1 if best is None or best.lr == rates[0] else int(best.lr == rates[-1])


def next_outward(trials: Sequence[Trial], spacing: float) -> float | None:
    """The next rate beyond the end at which the best one lies; None if the best lies between two others."""
    rates, where = [trial.lr for trial in trials], edge(trials)
    if where < 0:
        return _rounded(min(rates) / spacing, spacing)
    return higher if where and (higher := _rounded(max(rates) * spacing, spacing)) <= HIGHEST else None


def _rounded(rate: float, spacing: float) -> float:
    """The rate with as few digits as keep neighbours apart."""
    return float(f"{rate:.{2 if spacing >= 2 else 4}g}")
