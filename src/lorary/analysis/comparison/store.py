"""The file of a comparison: strict JSON, written atomically."""

from __future__ import annotations

from pathlib import Path

from lorary.analysis.comparison.record import Comparison


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as JSON, as a whole or not at all."""
    raise NotImplementedError


def read(path: Path) -> Comparison:
    """The comparison in a file.

    Raises:
        FileError: the file is missing, damaged, or not a comparison; with every reason.
    """
    raise NotImplementedError
