"""The progress of a comparison: all of its runs in one bar on a terminal, a line for each part elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorary.cli import printable
from lorary.cli._progress import progress_bar
from lorary.train.compare.compare import Ready

_MOST = 60  # characters


@contextmanager
def steps_bar(ready: Ready, *, quiet: bool) -> Iterator[Callable[..., Any]]:
    """The `progress` of a comparison.

    Its steps are counted for all of its runs from the beginning, so that the time that is left is that of the whole;
    rates that stop early and further ones move the end.
    """
    total = ready.steps_to_do
    with progress_bar(total, quiet=quiet) as update:
        on_terminal = sys.stderr.isatty()

        def progress(description: str = "", completed: int = 0, **_: Any) -> None:
            short = description if len(description) <= _MOST else description[: _MOST - 3] + "..."
            if description and on_terminal:
                update(description=short)
            elif description and not quiet:
                print(printable(description), file=sys.stderr)
            if completed:
                update(completed=completed, total=max(total, completed))

        yield progress
