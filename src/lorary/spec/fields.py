"""What a field of a word may hold, as dataclass metadata: `r: int = field(metadata=COUNT)`. The record checks it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeGuard


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value <= sys.float_info.max


WHOLE: dict[str, Any] = {
    "check": lambda value: _is_count(value) or (type(value) is int and value == 0),
    "expects": "a whole number of at least 0",
}
COUNT: dict[str, Any] = {"check": _is_count, "expects": "a whole number of at least 1"}
POSITIVE: dict[str, Any] = {"check": _is_positive, "expects": "a positive finite number"}
SEED = WHOLE
FLAG: dict[str, Any] = {"check": lambda value: type(value) is bool, "expects": "true or false"}
AMOUNT: dict[str, Any] = {
    "check": lambda value: _is_positive(value) or (_is_number(value) and value == 0),
    "expects": "a finite number of at least 0",
}
SHARE: dict[str, Any] = {
    "check": lambda value: _is_positive(value) and value < 1,
    "expects": "a number between 0 and 1",
}
# Of a run's optimizer steps: a share below 1, or their number.
STEPS: dict[str, Any] = {
    "check": lambda value: AMOUNT["check"](value) and (value < 1 or value == int(value)),
    "expects": "a share of the steps below 1, or a whole number of them",
}
SIZES: dict[str, Any] = {
    "check": lambda value: isinstance(value, tuple) and all(map(_is_count, value)),
    "expects": "whole numbers of at least 1",
}


def field_errors(word: Any) -> list[str]:
    """What the fields of a word hold that they may not."""
    contents = [(f, getattr(word, f.name)) for f in dataclasses.fields(word) if "check" in f.metadata]
    return [
        f"{type(word).__name__} has {f.name} = {content!r}; it takes {f.metadata['expects']}"
        for f, content in contents
        if not f.metadata["check"](content)
    ]


def one_of(*names: str) -> dict[str, Any]:
    """One of these texts."""
    return {"check": lambda value: isinstance(value, str) and value in names, "expects": " or ".join(names)}


def as_steps(said: float, steps: int) -> int:
    """What `STEPS` says of a run of so many optimizer steps, as a number of them."""
    return round(said * steps) if said < 1 else int(said)


def optional(field: dict[str, Any]) -> dict[str, Any]:
    """The same, or None."""
    return {
        "check": lambda value: value is None or field["check"](value),
        "expects": f"{field['expects']}, or None",
    }


def added_later(field: dict[str, Any]) -> dict[str, Any]:
    """The same for a field that older files do not have: it is written only where it is not what it is by default."""
    return field | {"later": True}
