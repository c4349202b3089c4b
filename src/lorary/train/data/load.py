"""The data of a run: read, normalised, and divided into training and held-out examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.config.config import DataSection
from lorary.train.config.tasks import FORMATS, wrong_format
from lorary.train.data._records import Record
from lorary.train.data._sources import read_source
from lorary.train.data.row_formats import Example, detect, normalise, unused


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Args:
        train: the examples to train on.
        validation: the held-out ones.
        format: the row format.
        notes: what a user should know, such as a detected format.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    format: str
    notes: tuple[str, ...]


def load(section: DataSection, task: str = "sft", seed: int = 42) -> Data:
    """The data of a configuration's `data` section.

    Args:
        section: the section.
        task: of the configuration; each takes rows of its own formats.
        seed: seed of the random held-out rows of `validation_split`.

    Raises:
        DataError: a source cannot be read, the rows have no common format, or the task cannot use their format.
    """
    name, rows = _read(section.train, "train", section)
    row_format = _format(rows, name, section, task)
    if why := wrong_format(task, row_format):
        raise DataError(f"cannot train on {name}:", [Diagnostic("data", *why)])
    notes = [
        f"{name}: {len(rows):,} rows in the format {row_format}{' (detected)' if section.format == 'auto' else ''}"
    ]
    examples = _examples(rows, row_format, name)
    if blank := len(rows) - len(examples):
        notes.append(f"{blank:,} rows of {name} are empty and left out")
    if left_out := unused(rows, row_format):
        notes.append(f"fields that the format {row_format} does not use: {', '.join(left_out)}")
    held_out: list[Example] = []
    if section.validation is not None:
        name, rows = _read(section.validation, "validation", section)
        held_out = _examples(rows, row_format, name)
        notes.append(f"{name}: {len(held_out):,} rows held out")
    elif section.validation_split > 0:
        examples, held_out = _divide(examples, section.validation_split, seed)
        notes.append(f"{len(held_out):,} of these rows held out, drawn with seed {seed}")
    return Data(tuple(examples), tuple(held_out), row_format, tuple(notes))


def load_validation(section: DataSection) -> list[Example]:
    """The examples of `section.validation`, without reading the training data.

    Raises:
        DataError: a source cannot be read, or the rows have no common format.
    """
    name, rows = _read(section.validation or (), "validation", section)
    return _examples(rows, _format(rows, name, section), name)


def _read(sources: Sequence[str], split: str, section: DataSection) -> tuple[str, list[Record]]:
    """(the sources' names, their rows)."""
    records = [record for source in sources for record in read_source(source, split, section.subset)]
    return ", ".join(sources), [_renamed(record, section.columns) for record in records]


def _format(rows: list[Record], name: str, section: DataSection, task: str = "sft") -> str:
    return detect(rows, name, FORMATS.get(task, ())) if section.format == "auto" else section.format


def _examples(rows: list[Record], row_format: str, name: str) -> list[Example]:
    """The rows as examples, without blank texts: data sets of documents have blank lines."""
    if row_format == "text":
        rows = [row for row in rows if not _is_blank(row.value)]
        if not rows:
            raise DataError(f"every text of {name} is empty")
    return normalise(rows, row_format, name)


def _is_blank(row: Any) -> bool:
    text = row.get("text") if isinstance(row, dict) else None
    return isinstance(text, str) and not text.strip()


def _renamed(record: Record, columns: dict[str, str]) -> Record:
    """The row under the format's own field names; `columns` maps these to the row's."""
    if not isinstance(record.value, dict) or not columns:
        return record
    if missing := [theirs for theirs in columns.values() if theirs not in record.value]:
        fields = ", ".join(f"`{field}`" for field in record.value)
        what = f"has no field `{missing[0]}`, which data.columns names; it has {fields}"
        raise DataError("cannot rename the fields of a row:", [Diagnostic(record.where, what)])
    used = {*columns.values(), *columns}
    kept = {key: value for key, value in record.value.items() if key not in used}
    return Record(kept | {ours: record.value[theirs] for ours, theirs in columns.items()}, record.where)


def _divide(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out), each in the order of the source; at least one row on either side."""
    if len(examples) < 2:
        raise DataError("cannot hold out rows:", [Diagnostic("data.validation_split", "there is only one row")])
    count = min(max(round(len(examples) * share), 1), len(examples) - 1)
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [example for i, example in enumerate(examples) if i in chosen]
