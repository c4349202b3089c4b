"""Messages of a conversation: checked, with their content as text and their tool calls as objects."""

from __future__ import annotations

from typing import Any

from lorary.train.data._tool_calls import listed, tool_calls

Messages = list[dict[str, Any]]
_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(value: Any, name: str) -> Messages:
    """`value` as a list of messages with text content.

    Raises:
        ValueError: which message is wrong, and why.
    """
    value = listed(value, f"`{name}`")
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of messages, not {kind_of(value)}")
    if not value:
        raise ValueError(f"`{name}` is empty")
    checked = []
    for i, turn in enumerate(value):
        at = f"`{name}[{i}]`"
        if not isinstance(turn, dict) or "role" not in turn:
            raise ValueError(f"{at} must have `role` and `content`")
        if turn["role"] not in _ROLES:
            raise ValueError(f"{at} has the role {turn['role']!r}; known: {', '.join(_ROLES)}")
        content = _content(turn.get("content"), at)
        if turn["role"] == "assistant" and not content.strip() and not turn.get("tool_calls"):
            raise ValueError(f"{at} is an empty answer")
        kept = {key: given for key, given in turn.items() if given is not None} | {"content": content}
        if kept.pop("tool_calls", None):
            kept["tool_calls"] = tool_calls(turn["tool_calls"], at)
        checked.append(kept)
    return checked


def _content(content: Any, at: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = {kind if isinstance(kind := part.get("type"), str) else kind_of(kind) for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(f"{at} has {', '.join(sorted(map(str, kinds - {'text'})))}; only text is supported")
    raise ValueError(f"{at} has {kind_of(content)} as its content, not a text")


def read_text(value: Any, name: str, empty: bool = False) -> str:
    """`value` as a text that is not blank, unless it may be.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, not {kind_of(value)}")
    if not empty and not value.strip():
        raise ValueError(f"`{name}` is empty")
    return value


def kind_of(value: Any) -> str:
    """A value's kind in JSON's words, for messages."""
    kinds: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "nothing",
    }
    return kinds.get(type(value)) or ("a number" if isinstance(value, int | float) else type(value).__name__)
