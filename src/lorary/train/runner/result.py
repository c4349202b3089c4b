"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.train.runner.folder import ADAPTER


@dataclass(frozen=True)
class Run:
    """The result of a run.

    Args:
        folder: the run folder.
        steps: optimizer steps, including those before a resume.
        history: the records of `metrics.jsonl`.
        interrupted: the number of the signal that ended it early; 0 if it finished.
        seconds: training time of this session.
        predicted: predicted bytes of memory; None if they could not be computed.
        measured: measured bytes of memory.
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
