"""The result of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import LoraryError
from lorary.train.runner.folder import ADAPTER
from lorary.train.runner.prepare import RunPlan
from lorary.train.runner.step_forecast import of_step
from lorary.train.trainer.step_memory import CountedStep, CountMemory

_log = logging.getLogger("lorary.train")


@dataclass(frozen=True)
class StepMemory:
    """The tensor memory of one step, counted and predicted for its micro-batch.

    Args:
        counted: the step.
        predicted: bytes; 0 if nothing was predicted.
    """

    counted: CountedStep
    predicted: int


def step_memory(prepared: RunPlan, counter: CountMemory, predicts: bool = True) -> StepMemory | None:
    """The memory of the counted step with the prediction for it, if it is wanted; None if either is unknown."""
    if (counted := counter.counted) is None or not predicts:
        return None if counted is None else StepMemory(counted, 0)
    try:
        predicted = of_step(prepared.config, prepared.plan, counted)
    except (LoraryError, OSError) as error:  # the base's configuration is read again
        _log.warning("the memory of step %d is not compared with its prediction: %s", counted.step, error)
        return None
    return None if predicted is None else StepMemory(counted, predicted)


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Args:
        folder: the run folder.
        steps: optimizer steps, including those before a resume.
        history: the records of `metrics.jsonl`.
        interrupted: the number of the signal that ended it early; 0 if it finished.
        seconds: training time of this session.
        predicted: predicted bytes of tensors with the longest rows; None if they could not be computed.
        measured: bytes of the process at its peak beyond those before the model was loaded: of the device's allocator
            if there is one, else resident memory, which holds more than tensors.
        step_memory: the tensors of one step; None if they were not counted.
        planned_steps: the steps of a run that does not stop early; None if it is not known.
        best_step: the step whose adapter was kept as the best; None for the last step's.
    """

    folder: Path
    steps: int
    history: tuple[dict[str, Any], ...]
    interrupted: int
    seconds: float
    predicted: int | None
    measured: int
    step_memory: StepMemory | None = None
    planned_steps: int | None = None
    best_step: int | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended it."""
        return not self.interrupted and self.planned_steps is not None and self.steps < self.planned_steps

    @property
    def ending(self) -> str:
        """How it ended, and the step of its adapter, as a sentence."""
        early = f" of {self.planned_steps:,}, stopped early" if self.stopped_early else ""
        best = f" of step {self.best_step:,}, the best," if self.best_step is not None else ""
        return f"done: {self.steps:,} steps{early}, in {self.seconds:.0f} s, adapter{best} in {self.adapter}"

    @property
    def adapter(self) -> Path:
        """The adapter's folder; an interrupted run has none yet."""
        return self.folder / ADAPTER
