"""The folder of a demo: what it leaves, and what the next one may replace."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorary.errors import Diagnostic, FileError

RUN, MERGED, REPORT = "run", "merged", "report.html"
MADE = (RUN, MERGED, REPORT)


def make_room(out: Path) -> None:
    """Removes what an earlier demo left, and nothing else.

    Raises:
        FileError: the folder holds something that no demo wrote.
    """
    if out.exists() and not out.is_dir():
        raise FileError("nothing was written:", [Diagnostic(str(out), "is a file", "name another folder with --out")])
    strange = sorted(path.name for path in out.iterdir() if path.name not in MADE) if out.is_dir() else []
    if strange:
        what = f"holds what no demo wrote: {', '.join(strange[:5])}"
        raise FileError("nothing was written:", [Diagnostic(str(out), what, "name another folder with --out")])
    for name in MADE:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
