"""The data of a run: read, brought to one form, and divided into what is learnt and what is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lorary.errors import DataError, Diagnostic
from lorary.train.config.config import DataSection
from lorary.train.data.records import Record
from lorary.train.data.row_formats import Example, detect, normalise, unused
from lorary.train.data.sources import read_source


@dataclass(frozen=True)
class Data:
    """What a run learns from.

    Args:
        train: the examples that are learnt.
        validation: the held-out ones; empty where there are none.
        shape: the shape that the rows had.
        notes: what is worth knowing, the detected shape among it.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    shape: str
    notes: tuple[str, ...]


def load(section: DataSection, task: str = "sft", seed: int = 42) -> Data:
    """Read the data that the `data` section of a configuration names.

    Args:
        section: the section.
        task: "sft" or "dpo": whether rows must be preference pairs.
        seed: of the random choice of held-out rows, where `validation_split` asks for one.

    Raises:
        DataError: a source that cannot be read, rows without a common shape, or a shape that the task cannot use.
    """
    shown = ", ".join(section.train)
    train = _read(section.train, "train", section)
    shape = section.format if section.format != "auto" else detect(train, shown)
    if (shape == "preference") != (task == "dpo"):
        what = f"the rows have the shape {shape}, and the task is {task}"
        fix = "set task: dpo" if task == "sft" else "DPO learns from rows with `prompt`, `chosen` and `rejected`"
        raise DataError(f"cannot train on {shown}:", [Diagnostic("data", what, fix)])
    notes = [f"{shown}: {len(train):,} rows of the shape {shape}" + ("" if section.format != "auto" else " (detected)")]
    train, blank = _without_blanks(train, shape, shown)
    if blank:
        notes.append(f"{blank:,} rows of {shown} are empty and left out")
    examples = normalise(train, shape, shown)
    left_out = unused(train, shape)
    if left_out:
        notes.append(f"fields that the shape {shape} does not use: {', '.join(left_out)}")
    held_out: list[Example] = []
    if section.validation is not None:
        rows = _read(section.validation, "validation", section)
        name = ", ".join(section.validation)
        held_out = normalise(_without_blanks(rows, shape, name)[0], shape, name)
        notes.append(f"{name}: {len(held_out):,} rows held out")
    elif section.validation_split > 0:
        examples, held_out = _divide(examples, section.validation_split, seed)
        notes.append(f"{len(held_out):,} of these rows held out, drawn with seed {seed}")
    return Data(tuple(examples), tuple(held_out), shape, tuple(notes))


def validation(section: DataSection) -> list[Example]:
    """The rows of `section.validation` alone, without reading what is learnt.

    Raises:
        DataError: a source that cannot be read, or rows without a common shape.
    """
    sources = section.validation or ()
    rows, name = _read(sources, "validation", section), ", ".join(sources)
    shape = section.format if section.format != "auto" else detect(rows, name)
    return normalise(_without_blanks(rows, shape, name)[0], shape, name)


def _read(sources: Sequence[str], split: str, section: DataSection) -> list[Record]:
    records = [record for source in sources for record in read_source(source, split, section.subset)]
    return [_renamed(record, section) for record in records] if section.columns else records


def _without_blanks(records: list[Record], shape: str, name: str) -> tuple[list[Record], int]:
    """Rows of plain text that hold any, and how many others there are: data sets of documents have blank lines."""
    if shape != "text":
        return records, 0
    kept = [
        r
        for r in records
        if not isinstance(r.value, dict) or r.value.get("text") is None or str(r.value["text"]).strip()
    ]
    if not kept:
        raise DataError(f"every text of {name} is empty")
    return kept, len(records) - len(kept)


def _renamed(record: Record, section: DataSection) -> Record:
    """The row under the names that shapes know; `columns` maps those to the row's own."""
    if not isinstance(record.value, dict):
        return record
    missing = [own for own in section.columns.values() if own not in record.value]
    if missing:
        fields = ", ".join(f"`{field}`" for field in record.value)
        what = f"has no field `{missing[0]}`, which data.columns names; it has {fields}"
        raise DataError("cannot rename the fields of a row:", [Diagnostic(record.where, what)])
    own = set(section.columns.values())
    kept = {key: value for key, value in record.value.items() if key not in own and key not in section.columns}
    return Record(kept | {ours: record.value[theirs] for ours, theirs in section.columns.items()}, record.where)


def _divide(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(kept, held out), each in the order of the source; at least one row on either side."""
    if len(examples) < 2:
        raise DataError("cannot hold out rows:", [Diagnostic("data.validation_split", "there is only one row")])
    count = min(max(round(len(examples) * share), 1), len(examples) - 1)
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [example for i, example in enumerate(examples) if i not in chosen]
    return kept, [example for i, example in enumerate(examples) if i in chosen]
