"""Sources of rows: files, folders, built-in data sets, the Hub. `SOURCE#SPLIT` selects a split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lorary.errors import DataError, Diagnostic, LoraryError, suggested_path
from lorary.files.home import expanded
from lorary.train.config.sources import Source, as_source
from lorary.train.data import _tables
from lorary.train.data._files import DOCUMENTS, is_data, iterate, read_file, suffix
from lorary.train.data._records import BadRows, Record, unreadable

# Prefixes of a split's file names, in a folder with one file or more per split.
_STEMS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
_ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog")  # documents about a folder, not of it


def read_source(
    source: str | Source, split: str, subset: str | None = None, wanted: frozenset[str] | None = None
) -> list[Record]:
    """The rows of one source.

    Args:
        source: a file, a folder, `builtin:NAME` or a Hub id, and possibly what differs for it; `#SPLIT` may follow.
        split: the split if the source does not name one.
        subset: configuration name of a Hub data set.
        wanted: the columns that a table must be read for, the others are only named; None: all.

    Raises:
        DataError: the source does not exist, or has rows that cannot be read.
    """
    given = as_source(source)
    place, limit = _place(given, split), given.limit
    if isinstance(place, list):
        found: list[Record] = []
        for file in place:
            if limit is None or len(found) < limit:
                found += read_file(file, wanted, None if limit is None else limit - len(found))
        return found
    name, chosen, path = place
    if name.startswith("builtin:"):
        from lorary.builtin import corpora

        rows = corpora.load(name, chosen)[:limit]
        return [Record(row, f"{name}: row {i}") for i, row in enumerate(rows, 1)]
    loaded = _saved(path, chosen) if path is not None else _hub(name, given.subset or subset, chosen, streaming=False)
    return _tables.dataset(loaded, path.name if path is not None else f"{name}[{chosen}]", wanted, limit)


def stream_source(
    source: str | Source, split: str, subset: str | None = None, wanted: frozenset[str] | None = None
) -> Iterator[Record]:
    """The rows of one source, one after the other. Arguments and errors are those of `read_source`."""
    given = as_source(source)
    place = _place(given, split)
    rows: Iterator[Record]
    if isinstance(place, list):
        rows = chain.from_iterable(_checked(file, wanted) for file in place)
    elif place[0].startswith("builtin:") or place[2] is not None:
        rows = iter(read_source(source, split, subset, wanted))  # these lie in memory, or are mapped into it
    else:
        name, chosen, _ = place
        loaded = _hub(name, given.subset or subset, chosen, streaming=True)
        rows = _tables.dataset_rows(loaded, f"{name}[{chosen}]", wanted)
    return islice(rows, given.limit)


def _checked(file: Path, wanted: frozenset[str] | None) -> Iterator[Record]:
    """The rows of a file; the first that cannot be read ends them."""
    bad, empty = BadRows(), True
    for record in iterate(file, bad, wanted):
        bad.refuse(file.name, 0)
        yield record
        empty = False
    bad.refuse(file.name, 0)
    if empty:
        raise DataError(f"{file} has no rows")


def _place(source: Source, split: str) -> list[Path] | tuple[str, str, Path | None]:
    """The files of a source; or (its name, the split, the folder of a saved data set).

    Raises:
        DataError: there is no such file, folder or split.
    """
    name, chosen = source.path, source.split or ""
    if not chosen and "#" in name and not Path(name).exists():
        name, _, chosen = name.rpartition("#")
    path = expanded(name)
    if name.startswith("builtin:"):
        return name, chosen or split, None
    try:
        if path.is_dir():
            saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
            return (name, chosen or split, path) if saved else _folder(path, chosen or split, asked=bool(chosen))
        if path.is_symlink() and not path.exists():
            raise unreadable(name, "it is a symbolic link that leads to no file, or to itself")
        if path.exists():
            if chosen:
                raise unreadable(str(source), f"{name} is one file and has no split `{chosen}`")
            return [path]
    except OSError as error:
        raise unreadable(name, error.strerror or str(error)) from None
    if is_data(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise unreadable(name, "there is no such file or folder", suggested_path(path))
    return name, chosen or split, None


def _folder(path: Path, split: str, asked: bool) -> list[Path]:
    """The files of a split in a folder: those of rows, or else its documents."""
    found = sorted(file for file in path.iterdir() if is_data(file) and file.is_file())
    documents = [file for file in found if suffix(file) in DOCUMENTS]
    files = [file for file in found if file not in documents]
    if not files:
        files = [file for file in documents if not file.stem.lower().startswith(_ABOUT)]
    stems = _STEMS.get(split, (split,))
    chosen = [file for file in files if _is_of(file, stems)]
    known = tuple(stem for each in _STEMS.values() for stem in each)
    if not chosen and not asked and not any(_is_of(file, known) for file in files):
        chosen = files  # the folder has no splits
    if not chosen:
        there = ", ".join(entry.name for entry in sorted(path.iterdir())[:8]) or "nothing"
        names = f"{', '.join(f'{stem}*' for stem in stems)}; .csv, .json, .jsonl, .md, .parquet, .tsv, .txt"
        raise unreadable(f"the folder {path}", f"no file of the split `{split}` ({names})", f"it contains {there}")
    return chosen


def _is_of(file: Path, stems: tuple[str, ...]) -> bool:
    """Whether the name of a file begins with one of `stems`; a document's, which may be any word, as a word."""
    name = file.stem.lower()
    if suffix(file) in DOCUMENTS:
        return any(re.match(rf"{re.escape(stem)}(?![^\W\d_])", name) for stem in stems)
    return name.startswith(stems)


def _saved(path: Path, split: str) -> Any:
    """One split of a data set that `datasets` saved."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(f"the data set {path}", str(error).splitlines()[0]) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise unreadable(f"the data set {path}", f"has no split `{split}`", f"it has {', '.join(loaded)}")
        loaded = loaded[split]
    return loaded


def _hub(name: str, subset: str | None, split: str, streaming: bool) -> Any:
    """One split of a data set on the Hub."""
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except LoraryError:
        raise
    except Exception as error:  # the Hub, the network and many readers are behind this one call
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "no file or folder has that name either; the Hub needs a network, and HF_TOKEN for private data"
        raise DataError(f"cannot load `{name}` from the Hub:", [Diagnostic("", reason, fix)]) from error
