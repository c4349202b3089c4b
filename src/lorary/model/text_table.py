"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], names: int = 0) -> list[str]:
    """The lines of a table in plain text; the column `names` is left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if i == names else str.rjust for i in range(len(widths))]
    return ["  ".join(pad(c, w) for pad, c, w in zip(pads, row, widths, strict=True)).rstrip() for row in rows]


def first_rows(rows: Sequence[tuple[str, ...]], most: int) -> list[tuple[str, ...]]:
    """The first rows of a table, and one with the number of the others.

    >>> first_rows([("a", "1"), ("b", "2"), ("c", "3")], 1)
    [('a', '1'), ('and 2 more', '')]
    """
    rest = len(rows) - most
    return [*rows[:most], *([(f"and {rest:,} more", *[""] * (len(rows[0]) - 1))] if rest > 0 else [])]
