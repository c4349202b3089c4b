"""Tools and tool calls in conversations, in the form that chat templates expect: objects, not JSON inside of texts.

Data sets write them in several ways: `tools` and `arguments` as JSON text (as OpenAI's API returns them), calls without
the `function` around them, and tables in which every call has every other call's arguments, with nothing in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorary.files import strict_json
from lorary.train.data._records import check_text


def tools(value: Any) -> list[Any] | None:
    """The tools of a row, from a list of JSON schemas or its JSON text; None if there are none.

    Raises:
        ValueError: they are something else.
    """
    value = _without_nothing(_parsed(value, "`tools`"))
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("`tools` must be a list of objects, each the JSON schema of a function")
    return value


def tool_calls(value: Any, at: str) -> list[dict[str, Any]]:
    """The calls of a message, each `{"type": "function", "function": {"name", "arguments"}}`.

    Raises:
        ValueError: a call has no name, or its arguments are not an object.
    """
    if not isinstance(value, list):
        raise ValueError(f"{at}.tool_calls must be a list of calls")
    return [_call(_without_nothing(call), f"{at}.tool_calls[{i}]") for i, call in enumerate(value)]


def call_in_text(value: Any, at: str) -> list[dict[str, Any]]:
    """The calls in the JSON text of a ShareGPT turn: `{"name", "arguments"}`, or a list of such.

    Raises:
        ValueError: it is something else.
    """
    value = _parsed(value, at)
    return tool_calls(value if isinstance(value, list) else [value], at)


def listed(value: Any, what: str) -> Any:
    """A list from its JSON text, as the cell of a CSV file holds it; any other value as it is.

    Raises:
        ValueError: the text begins like a list, and is not JSON.
    """
    return _parsed(value, what) if isinstance(value, str) and value.lstrip().startswith("[") else value


def _call(call: Any, at: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{at} must have a `function` with `name` and `arguments`")
    arguments = _parsed(function.get("arguments", {}), f"the arguments of {at}")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {at} must be an object, or the JSON text of one")
    inner = {"name": function["name"], "arguments": arguments}
    if function is call:
        return {"type": "function", "function": inner}
    outer: dict[str, Any] = dict(call)
    return {"type": "function"} | outer | {"function": dict(function) | inner}


def _parsed(value: Any, what: str) -> Any:
    """A value from its JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        parsed = strict_json.loads(value, most_digits=300)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    check_text(parsed, what)  # an escape inside of the JSON text may be half of a character
    return parsed


def _without_nothing(value: Any) -> Any:
    """The value without the empty fields of its objects, which tables add to make rows alike."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nothing(inner) for inner in value]
    return value
