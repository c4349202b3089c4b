"""Short runs of an arm, for the time and the memory of a step; their adapters are thrown away."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainerCallback

from lorary.train.compare.bench import Bench
from lorary.train.compare.outcomes import Failure, Stopped, attempted
from lorary.train.runner.run import run_prepared
from lorary.train.trainer.step_memory import CountMemory

UNTIMED = 2  # the first step is slow, and in the second one tensors are counted


@dataclass(frozen=True)
class Timing:
    """The measurements of a short run.

    Args:
        setup: seconds in which nothing was trained or evaluated.
        steps: seconds of each timed optimizer step.
        evaluation: seconds of an evaluation on the validation rows; 0 if there was none.
        peak: the most bytes of tensors alive in a step; 0 if they were not counted.
    """

    setup: float
    steps: tuple[float, ...]
    evaluation: float
    peak: int

    @staticmethod
    def from_record(found: Mapping[str, Any]) -> Timing | None:
        """The measurements that a record holds; None if it holds something else."""
        steps, seconds = found.get("steps"), (found.get("setup"), found.get("evaluation"), found.get("peak"))
        if found.keys() != {"setup", "steps", "evaluation", "peak"} or not isinstance(steps, list) or not steps:
            return None
        numbers = all(type(n) in (int, float) and 0 <= n < math.inf for n in (*steps, *seconds))
        return Timing(**{**found, "steps": tuple(steps)}) if numbers else None

    @property
    def step(self) -> float:
        """Seconds of a usual step."""
        return statistics.median(self.steps)


@dataclass(frozen=True)
class TimingJob:
    """A short run to be timed.

    Args:
        arm: name of its arm.
        lr: its learning rate.
        seed: of the order of its rows: runs with the same one have the same batches.
        steps: optimizer steps that are timed.
        evaluates: whether an evaluation is timed too.
    """

    arm: str
    lr: float
    seed: int
    steps: int
    evaluates: bool = False

    def __str__(self) -> str:
        return f"the first steps of {self.arm}"

    def run(self, bench: Bench, tell: Callable[[int], None]) -> Timing | Failure:
        """Train for a few steps."""
        return attempted(self.arm, self, lambda: self._timing(bench))

    def _timing(self, bench: Bench) -> Timing:
        start = time.monotonic()
        with TemporaryDirectory() as folder:
            length: dict[str, Any] = {"max_steps": self.steps + UNTIMED, "epochs": None}
            length |= {"eval_steps": self.steps + UNTIMED, "save_steps": self.steps + UNTIMED, "logging_steps": 10**6}
            plan = bench.run_plan(bench.request.arm(self.arm), self.lr, self.seed, folder, **length)
            clock, counter = _Clock(), CountMemory(lambda: ())
            counters = [counter] if plan.config.task == "classification" else []  # a run counts those of the others
            plan = plan if self.evaluates else replace(plan, held_out=None)
            done = run_prepared(plan, quiet=True, callbacks=[clock, *counters], report=False)
            if done.interrupted:
                raise Stopped(f"signal {done.interrupted}", done.interrupted)
        counted = done.step_memory.counted if done.step_memory else counter.counted
        spent = sum(clock.steps) + sum(clock.evaluations)
        return Timing(
            setup=max(time.monotonic() - start - spent, 0.0),
            steps=tuple(clock.steps[UNTIMED:]),
            evaluation=statistics.median(clock.evaluations) if clock.evaluations else 0.0,
            peak=counted.peak if counted else 0,
        )


class _Clock(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """The seconds of every optimizer step and evaluation."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(time.monotonic() - self._began)
        self._began = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluations.append(time.monotonic() - self._began)
        self._began = time.monotonic()
