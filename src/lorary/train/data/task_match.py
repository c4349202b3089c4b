"""Rows that belong to another task than the run's: they would train without an error, on something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.data._records import Record, names_of

MARKS = frozenset({"label", "labels"})  # fields that no format of supervised fine-tuning uses


def refuse_other_task(records: Sequence[Record], row_format: str, declared: bool, task: str, name: str) -> None:
    """Stop where the fields of the rows say another task.

    Args:
        records: of one source.
        row_format: theirs.
        declared: whether the user named the format; plain texts beside labels are then what they want.
        task: of the run.
        name: of the source.

    Raises:
        DataError: the right task.
    """
    if (row_format == "preference") != (task == "dpo"):
        what = f"the rows are in the format {row_format}, and the task is {task}"
        fix = "set task: dpo" if task == "sft" else "DPO trains on rows with `prompt`, `chosen` and `rejected`"
        raise DataError(f"cannot train on {name}:", [Diagnostic("data", what, fix)])
    if task != "sft" or declared:
        return
    found = next((record for record in records[:100] if _marks(record.value)), None)
    if found is None:
        return
    first, marks = found.value, _marks(found.value)
    if row_format == "prompt-completion" and isinstance(first[marks[0]], bool):
        right, does = "kto", "a completion with a `label` of true or false is feedback"
    elif row_format == "text":
        right, does = "classification", "a text with a label is classified"
    else:
        return
    what = f"the rows have {names_of([*(k for k in first if k in ('text', 'prompt', 'completion')), *marks])}: {does}"
    fix = f"set task: {right}, or data.format: {row_format} to train on the text alone"
    raise DataError(f"cannot train on {name} with task sft:", [Diagnostic(found.where, what, fix)])


def _marks(row: Any) -> list[str]:
    """The fields of a row that mark another task's."""
    return [mark for mark in sorted(MARKS) if isinstance(row, dict) and row.get(mark) is not None]
