"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = (), names: int = 0) -> Table:
    """A table for a Rich console.

    Args:
        title: above the table.
        rows: of text.
        head: the names of the columns; without them all columns are left-aligned.
        names: the only left-aligned column of a table with a head.
    """
    from rich.table import Table
    from rich.text import Text

    # as texts: brackets in a name are no markup
    table = Table(title=Text(title, "table.title"), title_justify="left", show_header=bool(head))
    for i, name in enumerate(head or [""] * len(rows[0])):
        table.add_column(Text(name), justify="right" if head and i != names else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str] = (),
    *,
    stderr: bool = False,
) -> None:
    """Print a table and lines below it: with a frame on a terminal, as plain text elsewhere.

    Args:
        title: above the table.
        head: the names of the columns.
        rows: of text.
        lines: below the table.
        stderr: print on standard error, for a table beside the result of a command.
    """
    from rich.console import Console

    from lorary.cli import printable
    from lorary.model.text_table import aligned

    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal:
        console.print(rich_table(title, [[printable(cell) for cell in row] for row in rows], head), markup=False)
    else:
        print(title, *(printable(line) for line in aligned([head, *rows])), sep="\n", file=console.file)
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)
