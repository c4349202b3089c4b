"""The shapes of a training row: detected from its fields, checked, and brought to one of three forms.

| shape | fields | becomes |
|---|---|---|
| text | text | `Text` |
| prompt-completion | prompt, completion (texts, or lists of messages) | `Pair`, or `Chat` |
| messages | messages [{role, content}], tools? | `Chat` |
| alpaca | instruction, output, input?, system? | `Chat` |
| sharegpt | conversations [{from, value}], system?, tools? | `Chat` |
| preference | prompt?, chosen, rejected (texts, or lists of messages) | `Preference` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import DataError, Diagnostic, nearest
from lorary.train.data.records import BadRows, Record, texts

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """Plain text, all of which is learnt."""

    text: str
    where: str


@dataclass(frozen=True)
class Pair:
    """A prompt and the completion that is learnt."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation, and for each message whether it is learnt."""

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


Example = Text | Pair | Chat | Preference


@dataclass(frozen=True)
class Shape:
    """What a row must hold, what it may hold, and how it is read."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Example]


def detect(records: Sequence[Record], name: str) -> str:
    """The shape that most rows have.

    Raises:
        DataError: the rows have none.
    """
    votes = Counter(shape for record in records if (shape := shape_of(record.value)))
    if votes:
        return votes.most_common(1)[0][0]
    fields = sorted({key for record in records[:100] if isinstance(record.value, dict) for key in record.value})
    needs = sorted({field for shape in SHAPES.values() for field in shape.needs})
    near = next((f"{ours}: {field}" for field in fields for ours in nearest(field, needs, most=1)), "prompt: question")
    what = (
        f"found the fields {', '.join(f'`{f}`' for f in fields)}" if fields else "the rows are no objects with fields"
    )
    known = "; ".join(f"{kind} ({', '.join(shape.needs)})" for kind, shape in SHAPES.items())
    fix = f"name the fields with data.columns, such as {{{near}}}; the shapes are: {known}"
    raise DataError(f"unknown row format in {name}:", [Diagnostic(records[0].where, what, fix)])


def shape_of(row: Any) -> str | None:
    """The shape of one row by its fields; None where it has none."""
    if not isinstance(row, dict):
        return None
    return next(
        (kind for kind, shape in SHAPES.items() if all(row.get(need) is not None for need in shape.needs)), None
    )


def normalise(records: Sequence[Record], kind: str, name: str) -> list[Example]:
    """Every row as the form that its shape becomes.

    Raises:
        DataError: rows that do not have the shape; the first five are named, the others counted.
    """
    shape, offenders, examples = SHAPES[kind], BadRows(), []
    for record in records:
        try:
            row = _checked(record.value, kind, shape)
            examples.append(shape.read(row, record.where))
        except ValueError as error:
            offenders.add(record.where, str(error))
    offenders.refuse(name, len(records))
    return examples


def unused(records: Sequence[Record], kind: str) -> list[str]:
    """Fields of the rows that the shape has no use for."""
    known = {*SHAPES[kind].needs, *SHAPES[kind].may}
    return sorted({key for record in records for key in record.value if key not in known})


def _checked(row: Any, kind: str, shape: Shape) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"is {_kind(row)}, not an object with fields")
    missing = [f"`{need}`" for need in shape.needs if row.get(need) is None]
    if missing:
        other = shape_of(row)
        mixed = f"; it looks like {other}, the others like {kind}" if other else ""
        raise ValueError(f"misses {' and '.join(missing)}{mixed}")
    for text in texts({key: row[key] for key in (*shape.needs, *shape.may) if key in row}):
        if "\0" in text:
            raise ValueError("contains a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("contains half of a surrogate pair, which is no Unicode text")
    return row


# --- the readers of the shapes ----------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], where: str) -> Text:
    return Text(_string(row, "text"), where)


def _pair(row: Mapping[str, Any], where: str) -> Example:
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        return Pair(_string(row, "prompt", empty=True), _string(row, "completion"), where)
    prompt, completion = messages(row["prompt"], "prompt"), messages(row["completion"], "completion")
    return _chat(prompt + completion, row, where, first=len(prompt))


def _messages(row: Mapping[str, Any], where: str) -> Chat:
    return _chat(messages(row["messages"], "messages"), row, where)


def _alpaca(row: Mapping[str, Any], where: str) -> Chat:
    asked = _string(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n{_string(row, 'input')}"
    turns: Messages = [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise ValueError("`history` must be a list of [instruction, answer] pairs")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": _string(row, "output")}]
    return _chat(turns, row, where)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_SHAREGPT_ROLES |= {"system": "system", "observation": "tool", "tool": "tool"}


def _sharegpt(row: Mapping[str, Any], where: str) -> Chat:
    said = row["conversations"]
    if not isinstance(said, list):
        raise ValueError(f"`conversations` must be a list of turns, not {_kind(said)}")
    turns: Messages = [{"role": "system", "content": _string(row, "system")}] if row.get("system") else []
    for i, turn in enumerate(said):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise ValueError(f"`conversations[{i}]` must hold `from` and `value`")
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            known = ", ".join(sorted(_SHAREGPT_ROLES))
            raise ValueError(f"`conversations[{i}]` is from {turn['from']!r}, which is none of {known}")
        turns.append({"role": role, "content": turn["value"]})
    return _chat(messages(turns, "conversations"), row, where)


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        better, worse = _string(row, "chosen"), _string(row, "rejected")
        if better == worse:
            raise ValueError("`chosen` and `rejected` are the same")
        return Preference(_string(row, "prompt"), better, worse, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        fields = ", ".join(f"`{key}` is {_kind(row.get(key))}" for key in ("prompt", "chosen", "rejected"))
        raise ValueError(f"all three must be texts, or all three lists of messages: {fields}")
    answers = [messages(chosen, "chosen"), messages(rejected, "rejected")]
    if answers[0] == answers[1]:
        raise ValueError("`chosen` and `rejected` are the same")
    shared = messages(prompt, "prompt") if prompt is not None else _shared(*answers)
    if prompt is None:
        answers = [answer[len(shared) :] for answer in answers]
    if not shared or not all(answers):
        raise ValueError("`chosen` and `rejected` must begin with the same prompt, and go on after it")
    return Preference(shared, answers[0], answers[1], where)


def _shared(a: Messages, b: Messages) -> Messages:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:same]


def _chat(turns: Messages, row: Mapping[str, Any], where: str, first: int = 0) -> Chat:
    learn = tuple(
        i >= first and turn["role"] == "assistant" and bool(turn.get("train", True)) for i, turn in enumerate(turns)
    )
    if not any(learn):
        raise ValueError("has no assistant message to learn")
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
    return Chat(turns, learn, row.get("tools"), where)


def messages(value: Any, name: str) -> Messages:
    """`value` as a list of messages with text content.

    Raises:
        ValueError: it is none; says which message is wrong, and how.
    """
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of messages, not {_kind(value)}")
    if not value:
        raise ValueError(f"`{name}` is empty")
    checked = []
    for i, turn in enumerate(value):
        at = f"`{name}[{i}]`"
        if not isinstance(turn, dict) or "role" not in turn:
            raise ValueError(f"{at} must hold `role` and `content`")
        if turn["role"] not in ("system", "developer", "user", "assistant", "tool"):
            raise ValueError(
                f"{at} has the role {turn['role']!r}, which is none of system, developer, user, assistant, tool"
            )
        content = _content(turn.get("content"), at)
        if turn["role"] == "assistant" and not (content or "").strip() and not turn.get("tool_calls"):
            raise ValueError(f"{at} is an empty answer")
        checked.append({key: said for key, said in turn.items() if said is not None} | {"content": content or ""})
    return checked


def _content(content: Any, at: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {part.get("type") for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(f"{at} holds {', '.join(sorted(map(str, kinds - {'text'})))}; only text can be learnt here")
    raise ValueError(f"{at} has a content that is {_kind(content)}, not a text")


def _string(row: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be a text, not {_kind(value)}")
    if not empty and not value.strip():
        raise ValueError(f"`{key}` is empty")
    return value


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "nothing",
    }
    return kinds.get(type(value)) or ("a number" if isinstance(value, int | float) else type(value).__name__)


SHAPES: dict[str, Shape] = {
    "preference": Shape(("chosen", "rejected"), ("prompt",), _preference),
    "messages": Shape(("messages",), ("tools",), _messages),
    "sharegpt": Shape(("conversations",), ("system", "tools"), _sharegpt),
    "prompt-completion": Shape(("prompt", "completion"), ("tools",), _pair),
    "alpaca": Shape(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "text": Shape(("text",), (), _text),
}
