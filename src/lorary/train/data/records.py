"""Rows and where they are from; the offenders among them, gathered until all rows have been seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import DataError, Diagnostic

SHOWN = 5


@dataclass(frozen=True)
class Record:
    """One row as it was written.

    Args:
        value: what a JSON reader gives.
        where: such as `train.jsonl:12`.
    """

    value: Any
    where: str


@dataclass
class BadRows:
    """Rows that cannot be used: the first few in full, the others counted."""

    shown: list[Diagnostic] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, what: str, fix: str = "") -> None:
        """Note one more."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(Diagnostic(where, what, fix))

    def refuse(self, name: str, rows: int) -> None:
        """Raise where there is any.

        Raises:
            DataError: naming the first five offenders and the number of all.
        """
        if not self.count:
            return
        more = [Diagnostic("", f"and {self.count - SHOWN:,} more")] if self.count > SHOWN else []
        of = f"{self.count:,} of {rows:,} rows" if rows >= self.count else f"{self.count:,} rows"
        raise DataError(f"{of} of {name} cannot be used:", [*self.shown, *more])


def source_of(where: str) -> str:
    """The file or data set that a row is from, by where it is.

    >>> source_of("train.jsonl:12"), source_of("builtin:docstrings: row 3")
    ('train.jsonl', 'builtin:docstrings')
    """
    return re.sub(r":(?: row )?\d+$", "", where)


def texts(value: Any) -> Iterator[str]:
    """Every text inside a row."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend([*item.keys(), *item.values()])
        elif isinstance(item, list | tuple):
            stack.extend(item)
