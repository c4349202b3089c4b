"""The folder that a command writes its adapter to."""

from __future__ import annotations

from pathlib import Path


def check_new(out: Path, action: str) -> None:
    """Refuse a folder that holds something, before the work.

    Args:
        out: the folder.
        action: of the command, for the error: "compress".

    Raises:
        FileError: it is a file, or not empty.
    """
    from lorary.errors import Diagnostic, FileError

    if not out.exists() and not out.is_symlink():
        return
    what = "is not empty" if out.is_dir() else "is a file, and an adapter is a folder"
    if not out.is_dir() or any(out.iterdir()):
        raise FileError(f"cannot {action}:", [Diagnostic(f"--out {out}", what, "name a new folder")])
