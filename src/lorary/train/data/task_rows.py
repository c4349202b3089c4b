"""Rows of the tasks that do not train on answers alone: judged answers (KTO), prompts (GRPO), labelled texts.

| format | fields | becomes |
|---|---|---|
| prompt-completion-label | prompt, completion (texts, or lists of messages), label (true or false) | `Judged` |
| prompt | prompt (a text, or a list of messages), and what the reward function takes | `Prompt` |
| classification | text, text_pair?, label (a name, a whole number, a list of these, or a decimal number) | `Labelled` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.train.data._messages import Messages, kind_of, read_messages, read_text

_JUDGEMENTS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 equal the first two


@dataclass(frozen=True)
class Judged:
    """A prompt and an answer that is good or bad."""

    prompt: str | Messages
    completion: str | Messages
    good: bool
    where: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, and the other fields of its row, for the reward function."""

    prompt: str | Messages
    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, with its label: a name, several names, or a number to predict."""

    text: str
    pair: str | None
    label: str | tuple[str, ...] | float
    where: str


@dataclass(frozen=True)
class Labels:
    """The labels of a classification.

    Args:
        names: in the order of the outputs; empty for a number to predict.
        problem: Transformers' `problem_type`.
    """

    names: tuple[str, ...] = ()
    problem: str = "regression"
    counts: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """One name for each output of the head."""
        return self.names or ("value",)

    def encode(self, label: str | tuple[str, ...] | float) -> int | float | list[float]:
        """A label as the loss of `problem` takes it."""
        if not self.names and isinstance(label, str):
            return float(label)  # a whole number among decimal ones
        if isinstance(label, tuple):
            return [float(name in label) for name in self.names]
        return self.names.index(label) if isinstance(label, str) else label


def read_judged(row: Mapping[str, Any], where: str) -> Judged:
    """A row of KTO.

    Raises:
        ValueError: what is wrong with it.
    """
    prompt, completion, label = row["prompt"], row["completion"], row["label"]
    known = label if not isinstance(label, str) else label.strip().lower()
    if not isinstance(known, bool | int | float | str) or known not in _JUDGEMENTS:
        raise ValueError(f"`label` must be true or false, not {label!r}")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("`prompt` and `completion` must both be texts, or both lists of messages")
    if isinstance(prompt, str):
        return Judged(prompt, read_text(completion, "completion"), _JUDGEMENTS[known], where)
    return Judged(read_messages(prompt, "prompt"), read_messages(completion, "completion"), _JUDGEMENTS[known], where)


def read_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """A row of GRPO.

    Raises:
        ValueError: what is wrong with it.
    """
    value = row["prompt"]
    prompt = read_text(value, "prompt") if isinstance(value, str) else read_messages(value, "prompt")
    return Prompt(prompt, {key: content for key, content in row.items() if key != "prompt"}, where)


def read_labelled(row: Mapping[str, Any], where: str) -> Labelled:
    """A row of a classification.

    Raises:
        ValueError: what is wrong with it.
    """
    pair = row.get("text_pair")
    second = None if pair is None else read_text(pair, "text_pair")
    return Labelled(read_text(row["text"], "text"), second, _label(row["label"]), where)


def _label(value: Any) -> str | tuple[str, ...] | float:
    if isinstance(value, list | tuple):
        names = [_label(entry) for entry in value]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("`label` is a list, which must hold names or whole numbers")
        return tuple(str(name) for name in names)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"`label` is {value}, not a finite number")
        return value
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"`label` must be a name, a number or a list of names, not {kind_of(value)}")
    if not value.strip():
        raise ValueError("`label` is empty")
    return value.strip()
