"""The `compare` section of a configuration: the methods that `lorary compare` compares, and how.

A method is written as on the command line, `[NAME=]PRESET[+PRESET...][:KEY=VALUE...]`, or as keys and values. A plus at
the end of a name belongs to it: `lora++dora` is `lora+` with `dora`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lorary.errors import ConfigError
from lorary.model.loading.source import Section
from lorary.spec.presets import FUNCTIONS, PRESETS
from lorary.train.config._fields import Count, Integer, Number, _problem, _split
from lorary.train.config.yaml_source import parse, scalar

LEAST_RATES, MOST_RATES = 3, 99
GENERAL = ("builtin:python",)  # the training domain of the built-in base
_UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "days": 86400}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")
_OUTSIDE_BRACKETS = r"(?![^\[]*\])(?![^{]*\})"


def rates(value: Any) -> Any:
    """Learning rates as they are listed, rising."""
    if value is None:
        return None
    listed = [_rate(item) for item in _split(value)] if isinstance(value, str | list | tuple) else [_rate(value)]
    if len(listed) < LEAST_RATES:
        what = f"has {len(listed)} learning rate{'s' if len(listed) > 1 else ''}, too few for a search"
        raise _problem(what, f"list at least {LEAST_RATES}, such as 1e-4, 3e-4, 1e-3")
    if any(a >= b for a, b in pairwise(listed)):
        raise _problem(f"are {', '.join(f'{rate:g}' for rate in listed)}", "let them rise, each once")
    return tuple(listed)


def _rate(value: Any) -> float:
    number = scalar(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= 1:
        raise _problem(f"names {value!r}, which is not a learning rate", "use numbers above 0 and at most 1")
    return float(number)


def number_or_rates(value: Any) -> Any:
    """How many learning rates each method tries, or the rates themselves."""
    number = scalar(value) if isinstance(value, str) else value
    if not isinstance(number, int) or isinstance(number, bool) or number == 1:
        return rates(value)
    if not LEAST_RATES <= number <= MOST_RATES or number % 2 == 0:
        fix = "the middle one is the method's own, with as many on each side"
        raise _problem(f"must be an odd number from {LEAST_RATES} to {MOST_RATES}, not {number}", fix)
    return number


def seconds(value: Any) -> Any:
    """The seconds of a time such as `20min`, `1h 30min` or `90s`."""
    if value is None:
        return None
    text = str(value).strip().lower()
    parts = _PART.findall(text)
    if not parts or _PART.sub("", text).strip() or any(unit not in _UNITS for _, unit in parts):
        fix = "write a number with its unit, such as 90s, 20min or 1.5h"
        raise _problem(f"is {value!r}, which is not a time", fix)
    if not (found := sum(float(number) * _UNITS[unit] for number, unit in parts)):
        raise _problem("is zero", "leave it out, for as long as it takes")
    return found


def one_arm(value: Any) -> Any:
    """A method as keys and values, from the text that names it; a name of its own if it has none."""
    if isinstance(value, str):
        return _read_arm(value.strip())
    if isinstance(value, Mapping) and isinstance(value.get("method"), str | list | tuple):
        value = {**value, "method": {"name": _split(value["method"])}}
    if isinstance(value, Mapping) and "name" not in value and isinstance(value.get("method"), Mapping):
        names = _split(value["method"].get("name", "lora"))
        return {**value, "name": "+".join(map(str, names)) if isinstance(names, list | tuple) else str(names)}
    return value


def _read_arm(text: str) -> dict[str, Any]:
    name, equals, rest = text.partition("=")
    if not equals or ":" in name:
        name, rest = "", text
    presets, *options = re.split(f":{_OUTSIDE_BRACKETS}", rest)
    if not presets.strip() or (equals and not name.strip() and rest != text):
        raise _problem(f"is {text!r}, which names no method", "such as lora, dora+rslora or wide=lora:r=64")
    found: dict[str, Any] = {"name": name.strip() or text, "method": _method_of(text, presets)}
    for option in options:
        key, equals, written = (part.strip() for part in option.partition("="))
        if not key or not equals:
            raise _problem(f"is {text!r}, where {option!r} is not key=value", "such as lora:r=8:alpha=16")
        target = found if key == "rates" else found["method"]
        if key in target:
            raise _problem(f"is {text!r}, where `{key}` is given twice", "keep one of the two")
        target[key] = _value(text, written)
    return found


def _method_of(text: str, presets: str) -> dict[str, Any]:
    """The `name` of a method section, and `drop` for LoRA-drop."""
    names = [name.strip() for name in re.split(r"\+(?=[^+])", presets)]
    for name, after in pairwise(names):
        if f"{name}+" in PRESETS:
            fix = f"write {name}++{after} for {name}+ with {after}; {after} alone is {name} with {after}"
            raise _problem(f"is {text!r}, which may mean {name} with {after}, or {name}+ with {after}", fix)
    plain = [name for name in names if name not in FUNCTIONS or not FUNCTIONS[name].section]
    sections = [FUNCTIONS[name].section for name in names if name not in plain]
    return {"name": plain or ["lora"]} | {key: value for section in sections for key, value in section.items()}


def _value(text: str, written: str) -> Any:
    if written[:1] not in ("[", "{", "'", '"'):
        return scalar(written)
    try:
        return parse(written, "value").tree
    except ConfigError:
        raise _problem(f"is {text!r}, where {written!r} is not YAML", "close every bracket and quote") from None


def _arms(value: Any) -> Any:
    """The items of text in which commas separate methods; one method as a list."""
    if isinstance(value, str):
        return [item.strip() for item in re.split(f",{_OUTSIDE_BRACKETS}", value)]
    return [value] if isinstance(value, Mapping) else value


def _texts(value: Any) -> Any:
    """One text as a list, none as the empty one: a path may contain a comma."""
    return [] if value is None else [value] if isinstance(value, str) else value


_Listed = tuple[float, ...]
_Rates = Annotated[_Listed | None, BeforeValidator(rates, json_schema_input_type=str | _Listed | None)]


class ArmSection(Section):
    """One method of a comparison."""

    name: str = Field(min_length=1, description="its name; empty: its presets")
    method: dict[str, Any] = Field(description="as the section `method`; what it leaves out is as there")
    rates: _Rates = Field(default=None, description="its own learning rates, as many as the others have")


_OneArm = Annotated[ArmSection, BeforeValidator(one_arm, json_schema_input_type=str | ArmSection)]
_Several = tuple[_OneArm, ...]
_NumberOrRates = int | _Listed


class CompareSection(Section):
    """The comparison of methods (`lorary compare`)."""

    methods: Annotated[_Several, BeforeValidator(_arms, json_schema_input_type=str | _Several)] = Field(
        default=(), description="such as lora, dora, lora+, or a list of {name: wide, method: {name: lora, r: 64}}"
    )
    rates: Annotated[_NumberOrRates, BeforeValidator(number_or_rates, json_schema_input_type=str | _NumberOrRates)] = (
        Field(default=3, description="learning rates of each method: their number, around its own, or a list")
    )
    spacing: Annotated[Number, Field(ge=1.1, le=1000)] = Field(default=3.16, description="factor between two of them")
    outward: Annotated[Integer, Field(ge=0, le=100)] = Field(
        default=2, description="most further rates of a method while its best is the lowest or the highest"
    )
    halving: bool = Field(default=True, description="stop hopeless rates after a third of their steps")
    seeds: Annotated[Integer, Field(ge=1, le=1000)] = Field(
        default=2, description="runs of each method at its best rate, which are judged on the test rows"
    )
    budget: Annotated[float | None, BeforeValidator(seconds, json_schema_input_type=str | None)] = Field(
        default=None, description="time for all of it, such as 20min or 1.5h; empty: as long as it takes"
    )
    match: Literal["rank", "parameters"] = Field(
        default="rank", description="parameters: each method has the rank that trains as many numbers as the reference"
    )
    reference: str = Field(default="", description="name of the method to compare with; empty: the first")
    general: Annotated[
        tuple[str, ...], BeforeValidator(_texts, json_schema_input_type=str | tuple[str, ...] | None)
    ] = Field(default=GENERAL, description="general text on which forgetting is measured; empty: none")
    validation_rows: Count = Field(default=64, description="most held-out rows on which rates are chosen")
    test_rows: Annotated[Integer, Field(ge=2, le=1_000_000_000)] = Field(
        default=128, description="most held-out rows on which methods are judged, none of those above"
    )
    general_rows: Count = Field(default=64, description="most rows of general text")
    workers: Annotated[Integer, Field(ge=1, le=1024)] = Field(
        default=1, description="runs at the same time, which share the cores"
    )

    @property
    def number_of_rates(self) -> int:
        """How many learning rates each method tries."""
        return self.rates if isinstance(self.rates, int) else len(self.rates)

    @property
    def names(self) -> Sequence[str]:
        """The names of the methods."""
        return [arm.name for arm in self.methods]
