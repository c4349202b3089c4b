"""Errors of a plan in the words of the configuration or command that asked for it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorary.errors import Diagnostic, PlanError

_FIELDS = ("targets", "exclude", "layers", "ranks", "alphas", "experts")
_EXCLUDE = re.compile(r"exclude=\[(.*?)\]")


def located(error: PlanError, places: Mapping[str, str]) -> PlanError:
    """The error with its fields at their places, and with hints that can be copied.

    Args:
        error: of `lorary.plan`, which speaks of its own arguments.
        places: dotted key -> the position in a file, or a flag such as `--targets`.
    """
    flags = any(place.startswith("--") and not place.startswith("--set") for place in places.values())
    problems = []
    for problem in error.problems:
        where, what = problem.where, problem.what
        if where in _FIELDS and (place := places.get(f"method.{where}")):
            where, what = place, what if place.startswith("--") else f"`{where}`: {what}"
        elif where in _FIELDS:
            where = f"--{where}" if flags and where in ("targets", "exclude", "layers") else f"method.{where}"
        problems.append(Diagnostic(where, what, _hint(problem.fix, flags)))
    return PlanError(error.headline, problems)


def _hint(fix: str, flags: bool) -> str:
    """`exclude=["a", "b"]` as a flag, or as YAML."""

    def written(found: re.Match[str]) -> str:
        names = found[1].replace('"', "")
        return f"--exclude '{names.replace(', ', ',')}'" if flags else f"exclude: [{found[1]}]"

    return _EXCLUDE.sub(written, fix)
