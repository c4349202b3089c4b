"""Sources of rows: files, folders, built-in data sets, the Hub. `SOURCE#SPLIT` selects a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorary.errors import DataError, Diagnostic, LoraryError, suggested_path
from lorary.train.data._files import READERS, read_file
from lorary.train.data._records import Record, unreadable

# Prefixes of a split's file names, in a folder with one file or more per split.
_STEMS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}


def read_source(source: str, split: str, subset: str | None = None) -> list[Record]:
    """The rows of one source.

    Args:
        source: a file, a folder, `builtin:NAME` or a Hub id; `#SPLIT` may follow.
        split: the split if the source does not name one.
        subset: configuration name of a Hub data set.

    Raises:
        DataError: the source does not exist, or has rows that cannot be read.
    """
    name, chosen = source, ""
    if "#" in source and not Path(source).exists():
        name, _, chosen = source.rpartition("#")
    split = chosen or split
    path = Path(name).expanduser()
    if name.startswith("builtin:"):
        from lorary.builtin import corpora

        return _records(corpora.load(name, split), name)
    if path.is_dir():
        return _folder(path, split, asked=bool(chosen))
    if path.exists():
        if chosen:
            raise unreadable(source, f"{name} is one file and has no split `{chosen}`")
        return read_file(path)
    if path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise unreadable(name, "there is no such file or folder", suggested_path(path))
    return _hub(name, subset, split)


def _folder(path: Path, split: str, asked: bool) -> list[Record]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS and file.is_file())
    stems = _STEMS.get(split, (split,))
    chosen = [file for file in files if file.stem.lower().startswith(stems)]
    known = tuple(stem for each in _STEMS.values() for stem in each)
    if not chosen and not asked and not any(file.stem.lower().startswith(known) for file in files):
        chosen = files  # the folder has no splits
    if not chosen:
        there = ", ".join(entry.name for entry in sorted(path.iterdir())[:8]) or "nothing"
        names = f"{', '.join(f'{stem}*' for stem in stems)}; {', '.join(sorted(READERS))}"
        raise unreadable(f"the folder {path}", f"no file of the split `{split}` ({names})", f"it contains {there}")
    return [record for file in chosen for record in read_file(file)]


def _saved(path: Path, split: str) -> list[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(f"the data set {path}", str(error).splitlines()[0]) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise unreadable(f"the data set {path}", f"has no split `{split}`", f"it has {', '.join(loaded)}")
        loaded = loaded[split]
    return _records(loaded, path.name)


def _hub(name: str, subset: str | None, split: str) -> list[Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except LoraryError:
        raise
    except Exception as error:  # the Hub, the network and many readers are behind this one call
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "no file or folder has that name either; the Hub needs a network, and HF_TOKEN for private data"
        raise DataError(f"cannot load `{name}` from the Hub:", [Diagnostic("", reason, fix)]) from error
    return _records(loaded, f"{name}[{split}]")


def _records(rows: Any, name: str) -> list[Record]:
    if not len(rows):
        raise DataError(f"{name} has no rows")
    return [Record(dict(row), f"{name}: row {i}") for i, row in enumerate(rows, 1)]
