"""The tasks of `lorary train`: the row formats, the learning rate and the fields of each."""

from __future__ import annotations

from typing import Any

TASK_LR = {"sft": 2e-4, "dpo": 5e-6, "kto": 5e-6, "grpo": 1e-5, "reward": 1e-4, "classification": 2e-4}
# The fields of `training` for some tasks alone, with their defaults.
TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {"dpo_beta": 0.1, "reference": None},
    "kto": {"kto_beta": 0.1, "reference": None},
    "grpo": {
        **{"grpo_beta": 0.0, "reference": None},
        **{"num_generations": 8, "max_completion_length": 256, "reward": None},
    },
}
# The row formats of a task; `sft` takes all others.
FORMATS = {
    "dpo": ("preference",),
    "reward": ("preference",),
    "kto": ("prompt-completion-label",),
    "grpo": ("prompt",),
    "classification": ("classification",),
}
ROWS = {
    "dpo": "preference pairs",
    "reward": "preference pairs",
    "kto": "answers with a label",
    "grpo": "prompts",
    "classification": "labelled texts",
}


def has_reference(task: str, grpo_beta: float | None) -> bool:
    """Whether the loss of a task contains a reference: that of GRPO does with a beta, which is 0 by default."""
    return "reference" in TASK_DEFAULTS.get(task, {}) and (task != "grpo" or bool(grpo_beta))


def wrong_format(task: str, row_format: str) -> tuple[str, str] | None:
    """Why a task cannot train on rows of a format, and what to do; None if it can."""
    if row_format in FORMATS.get(task, ()):
        return None
    owners = [name for name, formats in FORMATS.items() if row_format in formats]
    if task == "sft" and not owners:
        return None
    other = f"task: {' or '.join(owners or ['sft'])}"
    if task == "sft":
        return f"task `sft` does not train on {ROWS[owners[0]]}", f"set {other}, or {_as_answers(row_format)}"
    return f"task `{task}` trains on {ROWS[task]}, not `{row_format}`", f"use `{FORMATS[task][0]}` or {other}"


def _as_answers(row_format: str) -> str:
    """How rows of another task's format become rows of `sft`."""
    ways = {"classification": "text", "prompt-completion-label": "prompt-completion"}
    own = ways.get(row_format)
    return f"data.format: {own} to leave the labels out" if own else "map the answer with data.columns"
