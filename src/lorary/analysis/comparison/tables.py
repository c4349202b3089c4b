"""The tables of a comparison: rows of text, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorary.analysis.comparison.statistics import Findings


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Args:
        title: above it.
        head: names of the columns.
        rows: cells.
        notes: lines below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def summary(found: Findings) -> TextTable:
    """The most important columns, for a terminal."""
    raise NotImplementedError
