"""Writes a file or a folder, as a program to be killed: `python writer.py PATH TEXT`."""

from __future__ import annotations

import sys
from pathlib import Path

from lorary.files.atomic import atomic_directory, atomic_file
from lorary.files.manifest import write_manifest


def fill(folder: Path, text: str) -> None:
    """Three files that say the same."""
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "inner" / "a").write_text(text)
    (folder / "b").write_text(text)
    write_manifest(folder, {"text": text})


def write(path: Path, text: str) -> None:
    """A `.txt` is a file, all else a folder."""
    if path.suffix == ".txt":
        with atomic_file(path) as file:
            file.write(text.encode())
    else:
        with atomic_directory(path, replace=True) as folder:
            fill(folder, text)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
