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
    Rates that stop early make it shorter, further ones longer.
    """
    total, start, done = ready.steps_to_do, time.monotonic(), 0
    with progress_bar(total, quiet=quiet) as update:
        on_terminal = sys.stderr.isatty()

        def progress(description: str = "", completed: int = 0, **_: Any) -> None:
            nonlocal done
            done = max(done, completed)
            short = printable(description if len(description) <= _MOST else description[: _MOST - 3] + "...")
            if description and on_terminal:
                update(description=short)
            elif description and not quiet:
                left = (time.monotonic() - start) / done * (total - done) if done else 0.0
                about = f" (about {duration(left)} left)" if left >= 1 else ""
                print(f"{short}{about}", file=sys.stderr)
            if completed:
                update(completed=completed, total=max(total, completed))

        yield progress
