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
    """

    folder: Path
    steps: int
    history: tuple[dict[str, Any], ...]
    interrupted: int
    seconds: float
    predicted: int | None
    measured: int

    @property
    def adapter(self) -> Path:
        """The adapter's folder; an interrupted run has none yet."""
        return self.folder / ADAPTER
