"""The compatibility of presets: a verdict for every pair, which the tests verify and the docs show.

A pair is refused if `method` raises for it. Each preset adds the restrictions on its combinations with earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.errors import MethodError
from lorary.spec.presets import PRESETS, Restriction, method


@dataclass(frozen=True)
class Verdict:
    """The compatibility of two presets.

    Args:
        letter: `Y`, `r` (with a restriction) or `N`.
        why: the restriction, or the reasons of the refusal; empty for `Y`.
        options: options without which the two are refused.
    """

    letter: str
    why: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def verdict(one: str, other: str) -> Verdict:
    """The compatibility of two presets, in either order."""
    first, second = sorted((one, other), key=list(PRESETS).index)
    restriction = restriction_of(first, second)
    options = restriction.options if restriction else {}
    if why := refusal(first, second, **options):
        return Verdict("N", "; ".join(why))
    return Verdict("r", restriction.why, options) if restriction else Verdict("Y")


def restriction_of(one: str, other: str) -> Restriction | None:
    """The restriction that either of two presets states about the other."""
    return PRESETS[one].restrictions.get(other) or PRESETS[other].restrictions.get(one)


def refusal(*names: str, **options: Any) -> list[str]:
    """The reasons why `method` refuses these presets; empty if it does not."""
    try:
        method(*names, **options)
    except MethodError as error:
        return [problem.what for problem in error.problems]
    return []


def partners(name: str) -> dict[str, Verdict]:
    """The compatibility of a preset with every other one, in the order of the presets."""
    return {other: verdict(name, other) for other in PRESETS if other != name}
