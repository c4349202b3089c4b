"""Rows with their sources, and the errors for rows and files that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from lorary.errors import DataError, Diagnostic
from lorary.files.strict_json import show

SHOWN = 5
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One row as it was written.

    Args:
        value: the decoded JSON.
        where: its source, such as `train.jsonl:12`.
    """

    value: Any
    where: str


class Located(Protocol):
    """A row that knows its source."""

    @property
    def where(self) -> str:
        """Such as `train.jsonl:12`."""


Row = TypeVar("Row", bound=Located)
Result = TypeVar("Result")


@dataclass
class BadRows:
    """Rows that cannot be used: the first few in full, the others counted."""

    shown: list[Diagnostic] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, what: str, fix: str = "") -> None:
        """Record one more."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(Diagnostic(where, what, fix))

    @property
    def problems(self) -> list[Diagnostic]:
        """The first five, and the number of the others."""
        more = [Diagnostic("", f"and {self.count - SHOWN:,} more")] if self.count > SHOWN else []
        return [*self.shown, *more]

    def refuse(self, name: str, rows: int) -> None:
        """Raise if there are any.

        Raises:
            DataError: the first five bad rows, and the number of all.
        """
        if self.count:
            share = (
                f"{self.count:,} of {rows:,} rows"
                if rows >= self.count
                else f"{self.count:,} row{'s' * (self.count > 1)}"
            )
            raise DataError(f"{share} of {name} cannot be used:", self.problems)


def convert(rows: Sequence[Row], function: Callable[[Row], Result], name: str) -> list[Result]:
    """`function` of every row.

    Raises:
        DataError: rows for which `function` raises a ValueError; the first five are named, the others counted.
    """
    bad, results = BadRows(), []
    for row in rows:
        try:
            results.append(function(row))
        except ValueError as error:
            bad.add(row.where, str(error))
    bad.refuse(name, len(rows))
    return results


def check_text(value: Any, name: str) -> None:
    """Refuse texts that no tokenizer can read, anywhere inside the value of a field.

    Raises:
        ValueError: a NUL character, or half of a surrogate pair.
    """
    text = "\n".join(texts(value))
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL character; remove it")
    if half := _SURROGATE.search(text):
        what = f"{name} contains half of a surrogate pair (\\u{ord(half[0]):04x}), which is not Unicode text"
        raise ValueError(f"{what}; remove it, or write the whole pair")


def unreadable(source: object, what: str, fix: str = "", where: str = "") -> DataError:
    """The error for a source that cannot be read."""
    return DataError(f"cannot read {source}:", [Diagnostic(where, what, fix)])


def quoted_names(fields: Iterable[str], most: int = 12) -> str:
    """Field names for a message: quoted, made printable, and at most so many.

    >>> quoted_names(["a", "b", "c"], most=2)
    '`a`, `b` and 1 more'
    """
    names = list(fields)
    shown = ", ".join(
        f"`{name if len(name) <= 60 and name.isprintable() else show(name, 60)}`" for name in names[:most]
    )
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def source_of(where: str) -> str:
    """The file or data set of a row, from its `where`.

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
            stack.extend(reversed([*item.keys(), *item.values()]))
        elif isinstance(item, list | tuple):
            stack.extend(reversed(item))
