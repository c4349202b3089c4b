"""How commands find an adapter and its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorary.errors import FileError, Problem

if TYPE_CHECKING:
    from lorary.train.config import ModelSection

_FILES = ("lorary.json", "adapter_config.json")


def adapter_folder(path: Path) -> Path | None:
    """The adapter that `path` is, or that the run folder `path` holds; None where there is neither."""
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in _FILES):
            return folder
    return None


def base_of(adapter: Path, base: str | None, dtype: str = "auto") -> ModelSection:
    """The model to put an adapter on: `base`, or else the one that it says it was trained on.

    Raises:
        FileError: neither names a model that can be found.
    """
    from lorary.adapter import Adapter
    from lorary.train.config_file import from_dict

    name = base or Adapter.load(adapter).base.name
    if not name or (base is None and "/" not in name and not name.startswith("builtin:") and not Path(name).is_dir()):
        what = f"it was trained on `{name}`, which is no Hub id" if name else "it does not say what it was trained on"
        raise FileError(f"cannot find the base of {adapter}:", [Problem("", what, "give --base MODEL")])
    return from_dict({"model": {"id": name, "dtype": dtype}, "data": "builtin:docstrings"}).model
