"""The output folder of a demo."""

from __future__ import annotations

from pathlib import Path

from lorary.errors import Diagnostic, FileError
from lorary.files.atomic import remove

RUN, MERGED, REPORT = "run", "merged", "report.html"
CONTENTS = (RUN, MERGED, REPORT)


def clear_folder(out: Path) -> None:
    """Create the folder, or remove the results of an earlier demo from it.

    Raises:
        FileError: the folder holds other files.
    """
    if out.exists() and not out.is_dir():
        raise FileError("nothing was written:", [Diagnostic(str(out), "is a file", "name another folder with --out")])
    foreign = sorted(path.name for path in out.iterdir() if path.name not in CONTENTS) if out.is_dir() else []
    if foreign:
        what = f"holds files that are not from a demo: {', '.join(foreign[:5])}"
        raise FileError("nothing was written:", [Diagnostic(str(out), what, "name another folder with --out")])
    for name in CONTENTS:
        remove(out / name)
    out.mkdir(parents=True, exist_ok=True)
