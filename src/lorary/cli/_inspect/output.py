"""The output of an inspection: a table or JSON on standard output, and a folder with the page and the numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from lorary.analysis.html_report import versions
from lorary.cli import printable
from lorary.cli._table import rich_table
from lorary.files.atomic import atomic_directory
from lorary.model.text_table import aligned

HTML, JSON = "inspect.html", "inspect.json"
FILES = (HTML, JSON)


@contextmanager
def report_folder(out: Path | None) -> Iterator[Path | None]:
    """The folder to write the report into, which appears at the end of the block; None for none.

    It is opened before the work, so that a folder that is not writable is found at once.
    """
    if out is None:
        yield None
        return
    with atomic_directory(out, replace=True) as folder:
        yield folder
    print(f"wrote {out / HTML} and {JSON}", file=sys.stderr)


def write_report(folder: Path, record: dict[str, Any], page: str) -> None:
    """Write inspect.json and inspect.html into an existing folder."""
    (folder / JSON).write_text(json_text(record) + "\n", encoding="utf-8")
    (folder / HTML).write_text(page, encoding="utf-8")


def json_text(record: dict[str, Any]) -> str:
    """A record with the versions of the packages, as JSON."""
    whole = record | {"versions": versions("lorary", "torch", "transformers")}
    return json.dumps(whole, indent=2, allow_nan=False)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str] = ()) -> None:
    """Print a table, and lines below it."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(rich_table(title, [[printable(cell) for cell in row] for row in rows], head), markup=False)
    else:
        print(title, *(printable(line) for line in aligned([head, *rows])), sep="\n")
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on standard error."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
