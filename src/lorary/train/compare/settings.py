"""The settings of a comparison: how far each method is searched, on how many seeds it is judged, within which time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lorary.errors import ConfigError, Diagnostic
from lorary.train.config.compare_section import CompareSection

_SECTION = CompareSection()  # which has the defaults
_MANY = 1_000_000_000
_RANGES = {
    **{"rates": (1, 99), "outward": (0, 100), "seeds": (1, 1000), "workers": (1, 1024)},
    **{"validation_rows": (1, _MANY), "test_rows": (2, _MANY), "general_rows": (1, _MANY)},
}


@dataclass(frozen=True)
class Settings:
    """How methods are compared. The defaults are those of the section `compare` of a configuration.

    Args:
        rates: the learning rates that every method tries at first, around its own centre; an odd number.
        spacing: the factor between two of them.
        outward: the most further rates that a method tries while its best one is the lowest or the highest.
        seeds: the runs at the best rate that are judged on the test rows; none of them is a run of the search.
        halving: whether hopeless rates stop after a third of their steps.
        budget: seconds for the whole comparison; None: as long as it takes.
        match: "parameters" gives every method the rank at which it trains as many numbers as the reference does;
            "rank" leaves the ranks as they are.
        reference: name of the method whose numbers are matched; empty: the first one.
        general: sources of general text, as `data.train` in a configuration; their validation part is scored before
            and after training. Empty: what is forgotten is not measured.
        validation_rows: the most held-out rows on which rates are chosen: of examples 1, 3, ... of them
        test_rows: the most held-out rows on which methods are judged: of examples 2, 4, ...
        general_rows: the most rows of general text.
        workers: processes that train at the same time, sharing the processor's cores.

    Raises:
        ConfigError: a value is out of range; all of them.
    """

    rates: int = _SECTION.number_of_rates
    spacing: float = _SECTION.spacing
    outward: int = _SECTION.outward
    seeds: int = _SECTION.seeds
    halving: bool = _SECTION.halving
    budget: float | None = _SECTION.budget
    match: Literal["rank", "parameters"] = _SECTION.match
    reference: str = _SECTION.reference
    general: tuple[str, ...] = _SECTION.general
    validation_rows: int = _SECTION.validation_rows
    test_rows: int = _SECTION.test_rows
    general_rows: int = _SECTION.general_rows
    workers: int = _SECTION.workers

    def __post_init__(self) -> None:
        if problems := [*_problems(self)]:
            raise ConfigError("invalid settings of a comparison:", problems)


def _problems(s: Settings) -> Iterator[Diagnostic]:
    for key, (least, most) in _RANGES.items():
        value = getattr(s, key)
        if type(value) is not int or not least <= value <= most:
            end = f"at least {least}" if type(value) is not int or value < least else f"at most {most:,}"
            yield Diagnostic(key, f"is {value!r}", f"use a whole number of {end}")
        elif key == "rates" and value % 2 == 0:
            yield Diagnostic(key, f"is {value}", "use an odd number: a centre, and as many on each side")
    if not _is_number(s.spacing) or not 1.1 <= s.spacing <= 1000:
        yield Diagnostic("spacing", f"is {s.spacing!r}", "use a factor from 1.1 to 1000")
    if s.budget is not None and (not _is_number(s.budget) or s.budget <= 0):
        yield Diagnostic("budget", f"is {s.budget!r}", "use a number of seconds above 0, or None")
    if s.match not in ("rank", "parameters"):
        yield Diagnostic("match", f"is {s.match!r}", "use rank or parameters")
    if type(s.halving) is not bool:
        yield Diagnostic("halving", f"is {s.halving!r}", "use True or False")
    if not isinstance(s.reference, str):
        yield Diagnostic("reference", f"is {s.reference!r}", "use the name of a method")
    if not isinstance(s.general, tuple) or not all(isinstance(one, str) and one for one in s.general):
        yield Diagnostic("general", f"is {s.general!r}", "use a tuple of sources, such as ('builtin:python',)")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
