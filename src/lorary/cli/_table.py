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

    table = Table(title=title, title_justify="left", show_header=bool(head))
    for i, name in enumerate(head or [""] * len(rows[0])):
        table.add_column(name, justify="right" if head and i != names else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(title: str, rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
    """Print a table on standard output: with a frame on a terminal, as plain text elsewhere."""
    from rich.console import Console

    from lorary.model.text_table import aligned

    console = Console(highlight=False)
    if console.is_terminal:
        console.print(rich_table(title, rows, head), markup=False)
    else:
        print(*aligned([head, *rows]), sep="\n")
