"""A progress bar on standard error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int | None = None, *, quiet: bool = False) -> Iterator[Callable[..., Any]]:
    """A function with the keywords of Rich's `Progress.update`; without a terminal it does nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda **_: None
        return
    text = TextColumn("{task.description}", markup=False)
    with Progress(BarColumn(bar_width=24), TaskProgressColumn(), text, TimeRemainingColumn(), console=console) as bar:
        yield functools.partial(bar.update, bar.add_task("", total=total))
