"""The report of an inspection: a folder with a page and the numbers, and the numbers as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorary.analysis.html_report import versions
from lorary.files.atomic import atomic_directory

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
