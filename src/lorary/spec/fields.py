"""Validators of a component's fields, as dataclass metadata: `r: int = field(metadata=COUNT)`. `Method` runs them."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeGuard


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a real number, also one of NumPy, that a 64-bit float holds."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # of a whole number beyond the range
        return False


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value <= sys.float_info.max


def _validator(check: Callable[[Any], bool], expects: str) -> dict[str, Any]:
    return {"check": check, "expects": expects}


WHOLE = _validator(
    lambda value: _is_count(value) or (type(value) is int and value == 0), "a whole number of at least 0"
)
COUNT = _validator(_is_count, "a whole number of at least 1")
POSITIVE = _validator(_is_positive, "a positive finite number")
SEED = WHOLE
FLAG = _validator(lambda x: type(x) is bool, "true or false")
AT_LEAST_ONE = _validator(lambda x: _is_positive(x) and x >= 1, "a finite number of at least 1")
AMOUNT = _validator(lambda x: _is_positive(x) or (_is_number(x) and x == 0), "a finite number of at least 0")
SHARE = _validator(lambda x: _is_positive(x) and x < 1, "a number between 0 and 1")
PORTION = _validator(lambda x: _is_positive(x) and x <= 1, "a number above 0 and at most 1")
# a part of a run: a share of its optimizer steps below 1, or their number
STEPS = _validator(
    lambda x: AMOUNT["check"](x) and (x < 1 or x == int(x)),
    "a share of the steps below 1, or a whole number of them",
)
SIZES = _validator(lambda value: isinstance(value, tuple) and all(map(_is_count, value)), "whole numbers of at least 1")

TEXT = _validator(lambda value: isinstance(value, str), "a text")
IDS = _validator(
    lambda value: isinstance(value, tuple) and all(type(i) is int and 0 <= i < 2**63 for i in value), "token ids"
)
TEXTS = _validator(
    lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value), "texts"
)
NAMES = _validator(
    lambda value: isinstance(value, tuple) and all(isinstance(name, str) and name for name in value), "names of layers"
)


def field_errors(component: Any) -> list[str]:
    """The validation errors of a component's fields."""
    return [
        f"{type(component).__name__} has {f.name} = {value!r}; it takes {f.metadata['expects']}"
        for f in dataclasses.fields(component)
        if "check" in f.metadata and not f.metadata["check"](value := getattr(component, f.name))
    ]


def one_of(*names: str) -> dict[str, Any]:
    """Validator of a choice between names."""
    return _validator(lambda x: isinstance(x, str) and x in names, " or ".join(names))


def as_steps(value: float, steps: int) -> int:
    """The number of optimizer steps that a value of a `STEPS` field stands for in a run of `steps`."""
    return round(value * steps) if value < 1 else int(value)


def optional(field: dict[str, Any]) -> dict[str, Any]:
    """A validator that accepts None as well."""
    return _validator(lambda x: x is None or field["check"](x), f"{field['expects']}, or None")


def added_later(field: dict[str, Any], *, before: Any = dataclasses.MISSING) -> dict[str, Any]:
    """The validator of a field that older files lack: it is serialised only when it differs from what they mean.

    Args:
        field: the validator.
        before: what a file without the field means, if that is not the default.
    """
    return field | {"later": True} | ({} if before is dataclasses.MISSING else {"before": before})
