"""Prompts from a file: a text file with one per line, or rows with `prompt` or `messages`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.errors import DataError
from lorary.train.data._files import read_file
from lorary.train.data._messages import Messages
from lorary.train.data._records import BadRows, Record, check_text, unreadable


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer.

    Args:
        value: the text, or the messages.
        where: its place, for messages to the user.
    """

    value: str | Messages
    where: str

    @property
    def field(self) -> str:
        """Its name in a row."""
        return "prompt" if isinstance(self.value, str) else "messages"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in order.

    Args:
        path: .txt, where empty lines are left out; or .jsonl, .json, .csv, .tsv or .parquet.

    Raises:
        DataError: the file cannot be read; rows without a prompt, the first five by their lines.
    """
    if path.suffix.lower() == ".txt":
        return _lines(path)
    bad, prompts = BadRows(), []
    records = read_file(path, None)
    for record in records:
        value = _value(record)
        try:
            if value is None:
                raise ValueError("has neither a text `prompt` nor a list `messages` of {role, content}")
            check_text(value, "the prompt")
            prompts.append(Prompt(value, record.where))
        except ValueError as error:
            bad.add(record.where, str(error))
    bad.refuse(path.name, len(records))
    return prompts


def _lines(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise unreadable(path, "there is no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028 and its like, as `splitlines` does
    except UnicodeDecodeError:
        raise unreadable(path, "it is not UTF-8 text", "save it as UTF-8", path.name) from None
    found = [Prompt(line, f"{path.name}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} has no prompts")
    return found


def _value(record: Record) -> str | Messages | None:
    row: Any = record.value if isinstance(record.value, dict) else {}
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(messages, list) and messages and all(_is_turn(turn) for turn in messages):
        return [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
