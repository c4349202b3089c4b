"""Row formats: detected from the fields of a row, checked, and converted to one of four kinds of example.

| format | fields | becomes |
|---|---|---|
| text | text | `Text` |
| prompt-completion | prompt, completion (texts, or lists of messages) | `Pair`, or `Chat` |
| messages | messages [{role, content}], tools? | `Chat` |
| alpaca | instruction, output, input?, system? | `Chat` |
| sharegpt | conversations [{from, value}], system?, tools? | `Chat` |
| preference | prompt?, chosen, rejected (texts, or lists of messages) | `Preference` |

The formats of other tasks (`lorary.train.data.task_rows`) are detected likewise, a prompt alone last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from lorary.errors import DataError, Diagnostic, nearest
from lorary.train.data._messages import Messages as Messages
from lorary.train.data._messages import kind_of, read_messages, read_text
from lorary.train.data._records import Record, convert, quoted_names
from lorary.train.data._records import check_text as check_text
from lorary.train.data._tool_calls import call_in_text, listed, tools
from lorary.train.data.task_rows import Judged, Labelled, Prompt, read_judged, read_labelled, read_prompt

OF_TASKS = ("prompt-completion-label", "prompt", "classification")  # no format of `sft` or `dpo`


@dataclass(frozen=True)
class Text:
    """Plain text; every token is in the loss."""

    text: str
    where: str


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation; `learn` says of each message whether it is in the loss."""

    messages: Messages
    learn: tuple[bool, ...]
    tools: Any
    where: str


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer: three texts, or three lists of messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    where: str
    tools: Any = None


Example = Text | Pair | Chat | Preference | Judged | Prompt | Labelled


@dataclass(frozen=True)
class RowFormat:
    """The required and optional fields of a row, and the function that converts it."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Example]


def detect(records: Sequence[Record], name: str, preferred: Sequence[str] = ()) -> str:
    """The most frequent format of the rows.

    Args:
        records: the rows.
        name: of their source, for errors.
        preferred: the formats of a task; one of them that the first row has is taken before any other.

    Raises:
        DataError: no row has a known format.
    """
    first = records[0].value if records else None
    for kind in preferred:
        if isinstance(first, dict) and not _missing(first, ROW_FORMATS[kind]):
            return kind
    votes = Counter(found for record in records if (found := format_of(record.value)))
    if votes:
        return votes.most_common(1)[0][0]
    fields = sorted({key for record in records[:100] if isinstance(record.value, dict) for key in record.value})
    required = sorted({field for row_format in ROW_FORMATS.values() for field in row_format.required})
    near = next(
        (f"{ours}: {field}" for field in fields[:100] for ours in nearest(field[:100], required, most=1)),
        "prompt: question",
    )
    what = f"found the fields {quoted_names(fields)}" if fields else "the rows are not objects with fields"
    formats = {kind: ROW_FORMATS[kind] for kind in preferred or ROW_FORMATS if preferred or kind not in OF_TASKS}
    known = "; ".join(f"{kind} ({', '.join(row_format.required)})" for kind, row_format in formats.items())
    fix = f"name the fields with data.columns, such as {{{near}}}; the formats are: {known}"
    raise DataError(f"unknown row format in {name}:", [Diagnostic(records[0].where, what, fix)])


def format_of(row: Any) -> str | None:
    """The format of one row; None if no format fits its fields."""
    if not isinstance(row, dict):
        return None
    return next((kind for kind, row_format in ROW_FORMATS.items() if not _missing(row, row_format)), None)


def normalise(records: Sequence[Record], kind: str, name: str) -> list[Example]:
    """Every row, in the format `kind`, as an example.

    Raises:
        DataError: rows that do not have the format; the first five are named, the others counted.
    """
    return convert(records, lambda record: ROW_FORMATS[kind].read(_checked(record.value, kind), record.where), name)


def fields() -> frozenset[str]:
    """Every field that a row format uses."""
    formats = ROW_FORMATS.values()
    return frozenset(field for each in formats for field in (*each.required, *each.optional))


def unused(records: Sequence[Record], kind: str) -> list[str]:
    """The fields of the rows that the format does not use."""
    if kind == "prompt":  # the reward function may take all of them
        return []
    known = {*ROW_FORMATS[kind].required, *ROW_FORMATS[kind].optional}
    return sorted({key for record in records for key in record.value if key not in known})


def _missing(row: Mapping[str, Any], row_format: RowFormat) -> list[str]:
    return [field for field in row_format.required if row.get(field) is None]


def _checked(row: Any, kind: str) -> Mapping[str, Any]:
    row_format = ROW_FORMATS[kind]
    if not isinstance(row, dict):
        raise ValueError(f"is {kind_of(row)}, not an object with fields")
    if missing := _missing(row, row_format):
        other = format_of(row)
        mixed = f"; it looks like {other}, the others like {kind}" if other not in (None, "prompt") else ""
        raise ValueError(f"has no {' or '.join(f'`{field}`' for field in missing)}{mixed}")
    for field in (*row_format.required, *row_format.optional):
        check_text(row.get(field), f"`{field}`")
    return row


# --- readers of the formats -------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], where: str) -> Text:
    return Text(read_text(row["text"], "text"), where)


def _pair(row: Mapping[str, Any], where: str) -> Example:
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        return Pair(read_text(row["prompt"], "prompt", empty=True), read_text(row["completion"], "completion"), where)
    prompt, completion = read_messages(row["prompt"], "prompt"), read_messages(row["completion"], "completion")
    return _chat(prompt + completion, row, where, first=len(prompt))


def _messages(row: Mapping[str, Any], where: str) -> Chat:
    return _chat(read_messages(row["messages"], "messages"), row, where)


def _alpaca(row: Mapping[str, Any], where: str) -> Chat:
    question = read_text(row["instruction"], "instruction")
    if row.get("input"):
        question = f"{question}\n\n{read_text(row['input'], 'input')}"
    turns = _system(row)
    for turn in row.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError("`history` must be a list of [instruction, answer] pairs")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    answer = read_text(row["output"], "output")
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(turns, row, where)


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_SHAREGPT_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}


def _sharegpt(row: Mapping[str, Any], where: str) -> Chat:
    conversation = listed(row["conversations"], "`conversations`")
    if not isinstance(conversation, list):
        raise ValueError(f"`conversations` must be a list of turns, not {kind_of(conversation)}")
    turns = _system(row)
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"`conversations[{i}]` must have `from` and `value`")
        if turn["from"] == "function_call":
            call = call_in_text(turn["value"], f"`conversations[{i}]`")
            turns.append({"role": "assistant", "content": "", "tool_calls": call})
            continue
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(sorted([*_SHAREGPT_ROLES, "function_call"]))
            raise ValueError(f"`conversations[{i}]` is from {turn['from']!r}; known: {known}")
        turns.append({"role": role, "content": turn["value"]})
    return _chat(read_messages(turns, "conversations"), row, where)


def _system(row: Mapping[str, Any]) -> Messages:
    return [{"role": "system", "content": read_text(row["system"], "system")}] if row.get("system") else []


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        if chosen == rejected:
            raise ValueError("`chosen` and `rejected` are the same")
        prompt, chosen, rejected = (read_text(row[key], key) for key in ("prompt", "chosen", "rejected"))
        return Preference(prompt, chosen, rejected, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        fields = ", ".join(f"`{key}` is {kind_of(row.get(key))}" for key in ("prompt", "chosen", "rejected"))
        raise ValueError(f"all three must be texts, or all three lists of messages: {fields}")
    answers = [read_messages(chosen, "chosen"), read_messages(rejected, "rejected")]
    if answers[0] == answers[1]:
        raise ValueError("`chosen` and `rejected` are the same")
    if prompt is not None:
        shared = read_messages(prompt, "prompt")
    else:
        shared = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False))]
        answers = [answer[len(shared) :] for answer in answers]
    if not shared or not all(answers):
        raise ValueError("`chosen` and `rejected` must begin with the same prompt, and continue after it")
    return Preference(shared, answers[0], answers[1], where, tools(row.get("tools")))


def _chat(turns: Messages, row: Mapping[str, Any], where: str, first: int = 0) -> Chat:
    learn = tuple(
        i >= first and turn["role"] == "assistant" and bool(turn.get("train", True)) for i, turn in enumerate(turns)
    )
    if not any(learn):
        raise ValueError("has no assistant message to train on")
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
    return Chat(turns, learn, tools(row.get("tools")), where)


ROW_FORMATS: dict[str, RowFormat] = {
    "preference": RowFormat(("chosen", "rejected"), ("prompt", "tools"), _preference),
    "messages": RowFormat(("messages",), ("tools",), _messages),
    "sharegpt": RowFormat(("conversations",), ("system", "tools"), _sharegpt),
    "prompt-completion-label": RowFormat(("prompt", "completion", "label"), (), read_judged),
    "prompt-completion": RowFormat(("prompt", "completion"), ("tools",), _pair),
    "alpaca": RowFormat(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "classification": RowFormat(("text", "label"), ("text_pair",), read_labelled),
    "text": RowFormat(("text",), (), _text),
    "prompt": RowFormat(("prompt",), (), read_prompt),
}
