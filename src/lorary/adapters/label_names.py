"""The names of a classifier's labels, in a small file beside its adapter: `labels.json`.

    {"labels": ["negative", "positive"], "problem_type": "single_label_classification"}

PEFT's files have no place for them, and the base does not know them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorary.errors import Diagnostic, FileError
from lorary.files.atomic import atomic_file
from lorary.files.safe_open import read_json

NAME = "labels.json"
_MOST = 2**20  # bytes
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class LabelNames(NamedTuple):
    """The labels of a classifier.

    Args:
        names: in the order of its outputs.
        problem: Transformers' `problem_type`; None if unknown.
    """

    names: tuple[str, ...]
    problem: str | None = None


def write_label_names(folder: Path, names: Sequence[str], problem: str | None) -> None:
    """Write the names into an adapter folder."""
    record = {"labels": list(names), "problem_type": problem}
    with atomic_file(folder / NAME) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def read_label_names(folder: Path) -> LabelNames | None:
    """The names in an adapter folder; None if it has none.

    Raises:
        FileError: the file is damaged.
    """
    if not (folder / NAME).is_file():
        return None
    try:
        record = read_json(folder.resolve(), NAME, _MOST)
    except FileError as error:
        raise FileError(f"cannot read {folder}:", error.problems) from None
    names = record.get("labels") if isinstance(record, dict) else None
    problem = record.get("problem_type") if isinstance(record, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise FileError(f"cannot read {folder}:", [Diagnostic(f"{NAME}: labels", "must be a list of names")])
    if problem is not None and problem not in _PROBLEMS:
        what = f"is {problem!r}; known: {', '.join(_PROBLEMS)}"
        raise FileError(f"cannot read {folder}:", [Diagnostic(f"{NAME}: problem_type", what)])
    return LabelNames(tuple(names), problem)
