"""The announcement of a comparison: what will be run, before it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorary.analysis.comparison.record import Arm
from lorary.cli._table import print_table
from lorary.train.compare.compare import Ready
from lorary.train.compare.request import LEFT_OUT
from lorary.train.compare.search import HIGHEST
from lorary.train.config.sources import paths

_HEAD = ("method", "presets", "options", "learning rates")
FEW_ROWS = 20  # on which methods are judged; the intervals of fewer are wide


def print_announcement(ready: Ready, *, stderr: bool) -> None:
    """Print the methods with their rates, the data, the number of runs and the budget."""
    rows = [_row(arm) for arm in ready.request.arms]
    print_table("To compare", _HEAD, rows, [*_lines(ready), *_notes(ready)], stderr=stderr)


def _row(arm: Arm) -> tuple[str, ...]:
    method = dict(arm.method)
    names = method.pop("name", "lora")
    presets = names if isinstance(names, str) else ", ".join(names)
    return arm.name, presets, " ".join(_options(method)), " ".join(f"{rate:g}" for rate in arm.rates)


def _options(method: Mapping[str, Any]) -> Iterator[str]:
    """What is said of a method beside its presets."""
    for key, value in method.items():
        if key == "options" and isinstance(value, Mapping):
            yield from _options(value)
        else:
            yield f"{key}={value}"


def _lines(ready: Ready) -> Iterator[str]:
    request, settings = ready.request, ready.request.settings
    rows = ready.bench.held_out
    general = f", {len(rows.general):,} of general text" if rows.general else ""
    data = ", ".join(paths(request.config.data.train))
    yield f"base      {request.config.model.id}"
    held_out = f"{len(rows.validation.rows):,} to choose rates on, {len(rows.test):,} to judge methods on"
    yield f"data      {data}: {ready.training_rows:,} rows to train on, {held_out}{general}"
    seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    yield (
        f"runs      {request.runs} of {request.steps:,} steps: every rate on one seed, and the best of each method on "
        f"{seeds} more{_outward(ready)}{_done(ready)}"
    )
    if settings.budget is not None:
        yield f"budget    {duration(settings.budget)}; the first steps of each method tell what fits"


def _outward(ready: Ready) -> str:
    most = ready.request.settings.outward
    rates = f"{most} further rate{'s' if most > 1 else ''}"
    return f"; up to {rates} while the best is the lowest or the highest" if most else ""


def _done(ready: Ready) -> str:
    return f"; {ready.runs_done} are done already" if ready.runs_done else ""


def _notes(ready: Ready) -> Iterator[str]:
    request, settings = ready.request, ready.request.settings
    if (judging := len(ready.bench.held_out.test)) < FEW_ROWS:
        few = f"only {judging} rows judge the methods, which shows large differences alone: hold out more rows"
        yield f"note      {few}"
    reference = settings.reference or request.arms[0].name
    if settings.match == "parameters":
        unmatched = [arm.name for arm in request.arms if "r" not in arm.method and arm.name != reference]
        if unmatched:
            yield f"note      no rank changes how many numbers these train: {', '.join(unmatched)}"
    if ignored := [f"training.{key}" for key in LEFT_OUT if getattr(request.config.training, key)]:
        yield f"note      methods are judged after their last step: {', '.join(ignored)} left out"
    if cut := [arm.name for arm in request.arms if max(arm.rates) >= HIGHEST]:
        yield f"note      no rate above {HIGHEST:g} is tried: {', '.join(cut)}"
    for note in ready.bench.any_plan.lint.notes:
        yield f"note      {note}"


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(5400), duration(1200), duration(45)
    ('1 h 30 min', '20 min', '45 s')
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    parts = ((hours, "h"), (minutes, "min"), (left, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or f"{seconds:g} s"
