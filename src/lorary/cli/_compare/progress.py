"""The progress of a comparison: all of its runs in one bar on a terminal, a line for each part elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorary.cli import printable
from lorary.cli._compare.announcement import duration
from lorary.cli._progress import progress_bar
from lorary.train.compare.compare import Ready

_MOST = 60  # characters


@contextmanager
def steps_bar(ready: Ready, *, quiet: bool) -> Iterator[Callable[..., Any]]:
    """The `progress` of a comparison.

    Its steps are counted for all of its runs from the beginning, so that the time that is left is that of the whole.
    """
    total = (ready.request.runs - ready.runs_done) * ready.request.steps
    with progress_bar(total, quiet=quiet) as update:
        lines = _Lines(total) if not quiet and not sys.stderr.isatty() else None

        def progress(description: str = "", completed: int = 0, total: int = 0) -> None:
            short = printable(description if len(description) <= _MOST else description[: _MOST - 3] + "...")
            if lines is not None:
                lines.tell(short, completed, total)
            if short:
                update(description=short)
            if total:
                update(total=total)
            if completed:
                update(completed=completed)

        yield progress


class _Lines:
    """Lines for a log: one for each part, and one for each tenth of the steps."""

    def __init__(self, total: int) -> None:
        self.total, self.tenths, self.start = total, 0, time.monotonic()

    def tell(self, part: str, completed: int, total: int) -> None:
        """Print what has changed."""
        self.total = total or self.total
        if part:
            print(part, file=sys.stderr)
        tenths = 10 * completed // max(self.total, 1)
        if completed and self.tenths < tenths < 10:
            left = (time.monotonic() - self.start) / completed * (self.total - completed)
            print(f"{10 * tenths} % of the steps, about {duration(left)} left", file=sys.stderr)
            self.tenths = tenths
