"""The files and folders that a configuration names: found beside it, and recorded by their absolute paths.

A run can then be resumed from any working directory. Only names of something that exists are changed, so Hub ids,
`builtin:` names and misspellings stay as they are written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# (section, key) of every such name, or list of names; a name may end with `#` and a digest, or `:` and a function
PLACES = (
    ("model", "id"),
    ("model", "adapter"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "chat_template"),
    ("method", "after"),
    ("training", "reward"),
    ("compare", "general"),
)


def absolute(tree: dict[str, Any], base: Path) -> dict[str, Any]:
    """The tree of a configuration with the paths absolute that exist relative to a folder."""
    changed = dict(tree)
    for section, key in PLACES:
        inside = changed.get(section)
        if isinstance(inside, dict) and inside.get(key) is not None:
            changed[section] = {**inside, key: _absolute(inside[key], base)}
    return changed


def _absolute(value: Any, base: Path) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_absolute(item, base) for item in value)
    if isinstance(value, dict):  # a source with its settings
        return value | {"path": _absolute(value["path"], base)} if "path" in value else value
    if not isinstance(value, str) or not value.strip():
        return value
    path, mark, digest = value.partition("#")
    if not mark and ".py:" in value:
        path, mark, digest = value.rpartition(":")
    try:
        found = (base / path).exists()
    except (OSError, ValueError):  # a name that no file can have
        return value
    return f"{os.path.abspath(base / path)}{mark}{digest}" if found else value
