"""The results of a comparison: the table and the verdict on the terminal, JSON, and the page in its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from lorary.analysis.comparison.page import comparison_page
from lorary.analysis.comparison.record import Comparison
from lorary.analysis.comparison.statistics import Findings, findings
from lorary.analysis.comparison.tables import as_record, summary
from lorary.cli import printable
from lorary.cli._notes import print_notes
from lorary.cli._table import print_table
from lorary.errors import FileError
from lorary.files.atomic import atomic_file
from lorary.train.compare.ledger import FILE

PAGE = "comparison.html"
_FRAME = 3  # columns of a terminal that a cell takes beside its text


def print_results(
    comparison: Comparison, folder: Path, reference: str | None, *, as_json: bool, again: bool = False
) -> None:
    """Print the results, and write the page.

    Args:
        comparison: its record.
        folder: its folder.
        reference: name of the method to compare with; None: the one of the request.
        as_json: print JSON.
        again: whether the results are only shown; the page is then written if it is older than the record.
    """
    found = findings(comparison, reference or comparison.settings.get("reference") or None)
    page = folder / PAGE
    print_notes(_notes(comparison, folder))
    if not again or not page.exists() or page.stat().st_mtime < (folder / FILE).stat().st_mtime:
        try:
            with atomic_file(page) as file:
                file.write(comparison_page(found).encode())
        except (OSError, FileError) as error:  # a folder of someone else, or a full disk: the results are there
            print_notes([f"the page was not written: {error}"])
    if as_json:
        files = {"page": str(page), "record": str(folder / FILE)}
        print(json.dumps(as_record(found) | {"finished": not unfinished(comparison)} | files, indent=2))
    else:
        _print_table(found)
        print(f"\npage    {page}\nrecord  {folder / FILE}")


def _print_table(found: Findings) -> None:
    table = summary(found)
    console = Console()
    width = console.width if console.is_terminal else sys.maxsize
    pieces = columns_that_fit([table.head, *table.rows], width)
    for piece in pieces:
        head, *rows = ([line[i] for i in piece] for line in (table.head, *table.rows))
        print_table(table.title if piece is pieces[0] else "", head, rows)
    print("", *map(printable, table.notes), sep="\n")


def columns_that_fit(lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of a table in groups that fit into a terminal, each with the first one, the names.

    >>> columns_that_fit([["a", "loss", "rate"], ["lora", "0.1234", "0.001"]], 20)
    [[0, 1], [0, 2]]
    """
    first, *widths = (max(map(len, column)) + _FRAME for column in zip(*lines, strict=True))
    groups: list[list[int]] = []
    left = 0
    for i, wide in enumerate(widths, 1):
        if not groups or left < wide:
            groups.append([0])
            left = width - first - 1
        groups[-1].append(i)
        left -= wide
    return groups


def unfinished(comparison: Comparison) -> list[str]:
    """The methods whose measurements are not complete, and not left out for good."""
    left_out = {name for name, why in comparison.left_out.items() if not why.startswith("stopped")}
    return [arm.name for arm in comparison.arms if arm.name not in comparison.costs and arm.name not in left_out]


def _notes(comparison: Comparison, folder: Path) -> Iterator[str]:
    missing = unfinished(comparison)
    for what, why in comparison.left_out.items():
        if what not in missing:
            yield f"left out: {what}: {why}"
    if missing:
        yield f"not finished: {', '.join(missing)}; go on with: lorary compare {folder} --resume"
