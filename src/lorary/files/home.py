"""Paths that begin with `~`."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder for `~`; as it is if there is no such user, whom `Path.expanduser` would raise for.

    >>> expanded("~nobody-of-this-name/rows.jsonl").as_posix()
    '~nobody-of-this-name/rows.jsonl'
    """
    return Path(os.path.expanduser(path))
