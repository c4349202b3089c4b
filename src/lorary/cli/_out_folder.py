"""The folder for the report of a command, and its check before the work."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.errors import Diagnostic


def folder_problems(out: Path | None, own: Collection[str]) -> list[Diagnostic]:
    """Why a folder cannot take a report. Results of an earlier call may be replaced, no other file.

    Args:
        out: the folder, which need not exist; None if nothing is written.
        own: the names of the files that the command writes.
    """
    from lorary.errors import Diagnostic

    if out is None or not out.exists():
        return []
    if not out.is_dir():
        return [Diagnostic(f"--out {out}", "is a file", "name a folder")]
    foreign = sorted(path.name for path in out.iterdir() if path.name not in own)
    what = f"holds files that are not from this command: {', '.join(foreign[:5])}"
    return [Diagnostic(f"--out {out}", what, "name another folder")] if foreign else []
