"""The labels of a classification: their kind, names and order, from the data, the configuration or the base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorary.errors import DataError, Diagnostic, did_you_mean
from lorary.train.data._records import BadRows
from lorary.train.data.task_rows import Labelled, Labels

_KINDS = {"str": "single_label_classification", "tuple": "multi_label_classification", "float": "regression"}
_MOST = 1000  # listed in a configuration


def find_labels(
    train: Sequence[Labelled], held_out: Sequence[Labelled], wanted: Sequence[str] | None, own: Sequence[str] | None
) -> Labels:
    """The labels of a run.

    Args:
        train: the training rows.
        held_out: the held-out rows.
        wanted: `data.labels`.
        own: the labels of the base's own head; None if it has none.

    Raises:
        DataError: labels of several kinds, fewer than two, or others than the expected ones; each with its row.
    """
    rows = [*train, *held_out]
    problem = _KINDS[_kind(rows)]
    if problem == "regression":
        if wanted:
            what = "lists names, and the labels of the data are decimal numbers to predict"
            raise DataError("cannot classify:", [Diagnostic("data.labels", what, "remove it, or write names")])
        return Labels()
    counts = Counter(name for row in train for name in _names(row))
    found = counts.keys() | {name for row in held_out for name in _names(row)}
    names = tuple(wanted) if wanted else _of_base(found, own) or _ordered(found)
    _check(rows, names, "data.labels" if wanted else "the base's head")
    if len(names) < (1 if problem.startswith("multi") else 2):
        what = f"every row has the label `{names[0]}`" if names else "no row has a label"
        raise DataError("cannot classify:", [Diagnostic("label", what, "a classifier needs two labels")])
    if len(names) > _MOST:
        what = f"{len(names):,} different labels in {len(rows):,} rows"
        raise DataError("cannot classify:", [Diagnostic("label", what, "name the field with data.columns")])
    return Labels(names, problem, {name: counts[name] for name in names})


def label_notes(labels: Labels) -> list[str]:
    """What a user should know about the labels."""
    if not labels.names:
        return ["the labels are decimal numbers: the model predicts a number (regression)"]
    several = "several of " if labels.problem.startswith("multi") else ""
    shown = ", ".join(f"{name} ({labels.counts[name]:,})" for name in labels.names[:20])
    more = f" and {len(labels.names) - 20} more" if len(labels.names) > 20 else ""
    absent = [name for name in labels.names if not labels.counts[name]]
    return [f"{several}{len(labels.names)} labels: {shown}{more}"] + (
        [f"no training row has the label {', '.join(absent[:5])}"] if absent else []
    )


def own_labels(config: Any) -> tuple[str, ...]:
    """The names of a saved classifier's labels, in the order of its outputs."""
    return tuple(str(config.id2label[i]) for i in range(int(config.num_labels)))


def _names(row: Labelled) -> tuple[str, ...]:
    return row.label if isinstance(row.label, tuple) else (str(row.label),)


def _kind(rows: Sequence[Labelled]) -> str:
    kinds = [type(row.label).__name__ for row in rows]
    if kinds and set(kinds) == {"str", "float"} and all(_is_whole(row.label) for row in rows):
        return "float"  # 1 and 0.5 in one column are numbers
    if len(set(kinds)) > 1:
        odd = next(row for row, kind in zip(rows, kinds, strict=True) if kind != kinds[0])
        what = f"`label` is {odd.label!r}, and that of the first row {rows[0].label!r}"
        raise DataError("labels of several kinds:", [Diagnostic(odd.where, what)])
    return kinds[0] if kinds else "str"


def _is_whole(label: Any) -> bool:
    return isinstance(label, float) or (isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,30}", label) is not None)


def _ordered(names: Any) -> tuple[str, ...]:
    """The names in order: whole numbers by their value, false before true, texts by the alphabet."""
    return tuple(sorted(names, key=lambda name: (not _is_whole(name), int(name) if _is_whole(name) else 0, name)))


def _of_base(found: Any, own: Sequence[str] | None) -> tuple[str, ...]:
    """The base's labels; numbers stand for the outputs of a head whose labels have no names."""
    if own is None:
        return ()
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(own))
    if not unnamed:
        return tuple(own)
    numbers = tuple(map(str, range(len(own))))
    return numbers if found <= set(numbers) else _ordered(found) if len(found) == len(own) else tuple(own)


def _check(rows: Sequence[Labelled], names: Sequence[str], source: str) -> None:
    unknown = BadRows()
    for row in rows:
        for name in set(_names(row)) - set(names):
            hint = did_you_mean(name, list(names)) if len(names) <= 50 else ""
            fix = f"{hint}; data.labels lists the labels of a new head" if source != "data.labels" else hint
            unknown.add(row.where, f"the label `{name}` is not one of {source}", fix)
    unknown.refuse("the data", len(rows))
