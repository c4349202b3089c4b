"""The data of a run: read, normalised, and divided into training and held-out examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorary.errors import DataError, Diagnostic
from lorary.train.config.data_section import DataSection
from lorary.train.config.sources import Source, as_source
from lorary.train.config.tasks import FORMATS, wrong_format
from lorary.train.data._records import Record, quoted_names
from lorary.train.data._sources import read_source
from lorary.train.data.row_formats import Example, Pair, Preference, detect, fields, normalise, unused


@dataclass(frozen=True)
class Data:
    """The examples of a run.

    Args:
        train: the examples to train on.
        validation: the held-out ones.
        format: the row formats, in the order of the sources.
        notes: what a user should know, such as a detected format.
        copies: how often each training example occurs in an epoch; empty: once.
        sources: the source of each training example.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    format: str
    notes: tuple[str, ...]
    copies: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """The rows of one source as examples."""

    source: Source
    format: str
    examples: list[Example]
    notes: list[str]


def load(section: DataSection, task: str | None = "sft", seed: int = 42) -> Data:
    """The data of a configuration's `data` section.

    Args:
        section: the section.
        task: of the configuration; each takes rows of its own formats. None: rows of any format.
    seed: of the run: that of the random held-out rows of `validation_split` and of the rows that a weight draws,
        unless the section has its own.

    Raises:
        DataError: a source cannot be read, its rows have no common format, or the task cannot use their format.
    """
    seed = seed if section.seed is None else section.seed
    parts = [_read(as_source(source), "train", section, task) for source in section.train]
    notes = [note for part in parts for note in part.notes]
    examples = [example for part in parts for example in part.examples]
    sources = [str(part.source) for part in parts for _ in part.examples]
    kept, held_out = list(range(len(examples))), []
    if section.validation is not None:
        others = [_read(as_source(source), "validation", section, task) for source in section.validation]
        held_out = [example for part in others for example in part.examples]
        notes += [f"{part.source}: {len(part.examples):,} rows held out" for part in others]
    elif section.validation_split > 0:
        kept, chosen = _divide(len(examples), section.validation_split, seed)
        held_out = [examples[i] for i in chosen]
        notes.append(f"{len(held_out):,} of these rows held out, drawn with seed {seed}")
    notes += _none_left(parts, kept)
    copies, weight_notes = _copies(parts, kept, seed)
    kept = [i for i in kept if copies[i]]
    _check_separator(section, [examples[i] for i in kept])
    return Data(
        tuple(examples[i] for i in kept),
        tuple(held_out),
        ", ".join(dict.fromkeys(part.format for part in parts)),
        (*notes, *weight_notes),
        tuple(copies[i] for i in kept),
        tuple(sources[i] for i in kept),
    )


def load_validation(section: DataSection, task: str | None = None) -> list[Example]:
    """The examples of `section.validation`, without reading the training data.

    Raises:
        DataError: a source cannot be read, or its rows have no common format.
    """
    found = [_read(as_source(source), "validation", section, task) for source in section.validation or ()]
    return [example for part in found for example in part.examples]


def wanted_fields(source: Source, section: DataSection, task: str | None) -> frozenset[str] | None:
    """The columns of a table that the rows of a source may need; None for all, which a reward function may take."""
    if task == "grpo":
        return None
    return fields() | set(columns_of(source, section).values())


def columns_of(source: Source, section: DataSection) -> dict[str, str]:
    """The field names of a source: its own, or those of the section."""
    return section.columns if source.columns is None else source.columns


def renamed(record: Record, columns: dict[str, str]) -> Record:
    """The row under the format's own field names; `columns` maps these to the row's."""
    if not isinstance(record.value, dict) or not columns:
        return record
    if missing := [theirs for theirs in columns.values() if theirs not in record.value]:
        what = f"has no field `{missing[0]}`, which data.columns names; it has {quoted_names(record.value)}"
        raise DataError("cannot rename the fields of a row:", [Diagnostic(record.where, what)])
    used = {*columns.values(), *columns}
    kept = {key: value for key, value in record.value.items() if key not in used}
    return Record(kept | {ours: record.value[theirs] for ours, theirs in columns.items()}, record.where)


def format_of_source(
    rows: Sequence[Record], source: Source, section: DataSection, task: str | None
) -> tuple[str, bool]:
    """(the format of a source's rows, whether it was declared).

    Raises:
        DataError: it cannot be detected, or belongs to another task.
    """
    declared = section.format if source.format is None else source.format
    found = detect(rows, str(source), FORMATS.get(task or "sft", ())) if declared == "auto" else declared
    if task is not None and (why := wrong_format(task, found)):
        raise DataError(f"cannot train on {source}:", [Diagnostic(rows[0].where, *why)])
    return found, declared != "auto"


def _read(source: Source, split: str, section: DataSection, task: str | None) -> _Part:
    name, columns = str(source), columns_of(source, section)
    rows = read_source(source, split, section.subset, wanted_fields(source, section, task))
    rows = [renamed(row, columns) for row in rows]
    row_format, declared = format_of_source(rows, source, section, task)
    notes = [f"{name}: {len(rows):,} rows in the format {row_format}{'' if declared else ' (detected)'}"]
    examples = [separated(example, section.separator) for example in _examples(rows, row_format, name)]
    if blank := len(rows) - len(examples):
        notes.append(f"{blank:,} rows of {name} are empty and left out")
    if left_out := unused(rows, row_format):
        notes.append(f"fields that the format {row_format} does not use: {quoted_names(left_out).replace('`', '')}")
    return _Part(source, row_format, examples, notes)


def _examples(rows: list[Record], row_format: str, name: str) -> list[Example]:
    """The rows as examples, without blank texts: data sets of documents have blank lines."""
    if row_format == "text":
        rows = [row for row in rows if not is_blank(row.value)]
        if not rows:
            raise DataError(f"every text of {name} is empty")
    return normalise(rows, row_format, name)


def is_blank(row: object) -> bool:
    """Whether a row of the format `text` is blank."""
    text = row.get("text") if isinstance(row, dict) else None
    return isinstance(text, str) and not text.strip()


def _divide(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """(kept, held out) numbers of rows, in their order; at least one on either side."""
    if count < 2:
        raise DataError("cannot hold out rows:", [Diagnostic("data.validation_split", "there is only one row")])
    chosen = set(random.Random(seed).sample(range(count), min(max(round(count * share), 1), count - 1)))
    return [i for i in range(count) if i not in chosen], sorted(chosen)


def _none_left(parts: Sequence[_Part], kept: Sequence[int]) -> list[str]:
    """A note of the sources of which every row is held out, as may happen to a file that is one text."""
    remaining, start, names = set(kept), 0, []
    for part in parts:
        end = start + len(part.examples)
        if part.examples and remaining.isdisjoint(range(start, end)):
            names.append(str(part.source))
        start = end
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"held out as a whole, so not trained on: {', '.join(names[:3])}{more}"] if names else []


def _copies(parts: Sequence[_Part], kept: Sequence[int], seed: int) -> tuple[list[int], list[str]]:
    """(how often each example occurs in an epoch, the shares of the sources if they are weighted).

    n rows of weight w give round(n·w): each row ⌊w⌋ times, and of the rest a sample without replacement.
    """
    copies, start, of_source = [0] * sum(len(part.examples) for part in parts), 0, []
    remaining = set(kept)
    for number, part in enumerate(parts):
        rows = [i for i in range(start, start + len(part.examples)) if i in remaining]
        start += len(part.examples)
        whole = int(part.source.weight)
        more = round(len(rows) * part.source.weight) - whole * len(rows)
        drawn = set(random.Random(f"weight/{seed}/{number}").sample(rows, more))
        for i in rows:
            copies[i] = whole + (i in drawn)
        of_source.append((part, sum(copies[i] for i in rows)))
        if rows and not of_source[-1][1]:
            what = f"the weight {part.source.weight:g} leaves none of its {len(rows):,} rows"
            raise DataError("cannot weight the sources:", [Diagnostic(str(part.source), what, "raise the weight")])
    if all(part.source.weight == 1 for part in parts):
        return copies, []
    total = sum(count for _, count in of_source)
    return copies, [
        f"{part.source}: weight {part.source.weight:g}, {count:,} rows per epoch ({count / total:.1%})"
        for part, count in of_source
    ]


def _check_separator(section: DataSection, examples: Sequence[Example]) -> None:
    if section.separator is None or any(separable(example) for example in examples):
        return
    what = "no row has a prompt and a completion that are texts, so there is nothing to separate"
    raise DataError("cannot separate the data:", [Diagnostic("data.separator", what, "remove it")])


def separable(example: Example) -> bool:
    """Whether a separator can stand between the parts of an example: texts, not messages."""
    return isinstance(example, Pair) or (isinstance(example, Preference) and isinstance(example.prompt, str))


def separated(example: Example, separator: str | None) -> Example:
    """The example with a separator at the head of its answers, where the model writes it itself."""
    if separator is None or not separable(example):
        return example
    if isinstance(example, Pair):
        return replace(example, completion=separator + example.completion)
    assert isinstance(example, Preference)
    return replace(example, chosen=f"{separator}{example.chosen}", rejected=f"{separator}{example.rejected}")
