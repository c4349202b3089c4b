"""The tables of a comparison: rows of text, for the page and the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.analysis.comparison.record import Arm, Cost, Trial
from lorary.analysis.comparison.statistics import Difference, Findings, Interval, Standing
from lorary.analysis.comparison.words import change, level, rate, remarks, verdict
from lorary.errors import LoraryError
from lorary.model.plan import human_bytes
from lorary.spec.presets import method

Column = tuple[str, Callable[[Standing], str]]
_NEAR = 0.05  # share by which numbers of trained parameters may differ and count as equal
_VERSION = "lorary-findings/1"


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Args:
        title: above it.
        head: names of the columns; the first is the method.
        rows: cells.
        notes: lines below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def summary(found: Findings) -> TextTable:
    """The most important columns, for a terminal, with the verdict below."""
    against = [*_against(found)][:2]  # the verdicts on the best are in the notes
    columns = [_METHOD, *_measures(found), *against, *_forgetting(found), *_costs(found, short=True), _RATE]
    columns += _diverged(found)
    return _table("Comparison", found, columns, notes=[verdict(found), *remarks(found)])


def quality(found: Findings, arms: Collection[str] = ()) -> TextTable:
    """Loss, differences and forgetting, for all arms or some."""
    columns = [_METHOD, *_measures(found), *_against(found), *_forgetting(found), _RATE, _SEEDS]
    columns += _diverged(found)
    base = [""] * (len(columns) - 2)
    bottom = [["no adapter", level(Interval(found.base)), *base]] if found.base is not None and not arms else []
    return _table("Quality", found, columns, arms, bottom)


def costs(found: Findings) -> TextTable:
    """Sizes, memory, time, context."""
    return _table("Cost", found, [_METHOD, *_costs(found)])


def serving(found: Findings) -> TextTable:
    """Merging, engines."""
    engines = dict.fromkeys(name for c in found.comparison.costs.values() for name in c.engines)
    columns = [(engine, _of(found, lambda c, engine=engine: _served(c, engine))) for engine in engines]  # type: ignore[misc]
    return _table("Serving", found, [_METHOD, ("merges", _of(found, lambda c: c.merge)), *columns])


def limits(found: Findings) -> TextTable:
    """Why methods do not merge or are not served, and how large errors of merging are; equal ones in one row."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for standing in found.standings:
        if (given := found.comparison.costs.get(standing.arm)) is None:
            continue
        for what, why in {"merging": given.merge_note, **given.engines}.items():
            if why:
                reasons.setdefault((what, why), []).append(standing.arm)
    return TextTable("Why not", ("of", "note", "methods"), [(*key, ", ".join(of)) for key, of in reasons.items()])


def views(found: Findings) -> list[tuple[TextTable, str]]:
    """The arms of equal rank, and those with equally many trained numbers, each with a sentence.

    Empty unless both exist and differ. Equal is equal to the reference, or else to the best.
    """
    centre = found.reference or found.best
    by_name = {arm.name: arm for arm in found.comparison.arms}
    if not centre:
        return []
    judged = [s.arm for s in found.standings if s.loss is not None]
    rank, trained = _rank(by_name[centre]), _trained(found, centre)
    same_rank = [arm for arm in judged if rank is not None and _rank(by_name[arm]) == rank]
    same_count = [arm for arm in judged if trained and abs(_trained(found, arm) - trained) <= _NEAR * trained]
    if min(len(same_rank), len(same_count)) < 2 or same_rank == same_count:
        return []
    near = f"The methods that train as many numbers as {centre}, {trained:,}, within {_NEAR:.0%}."
    return [
        (replace(quality(found, same_rank), title="Equal rank"), f"The methods with the rank of {centre}, {rank}."),
        (replace(quality(found, same_count), title="Equally many trained numbers"), near),
    ]


def runs(found: Findings) -> TextTable:
    """All runs, by method, seed and rate."""
    rows = []
    for t in found.comparison.trials:
        own = t.seed if t.init_seed is None else t.init_seed
        rows.append((t.arm, f"{t.lr:.3g}", str(t.seed), str(own), f"{t.steps:,}", _last_loss(t), t.ending, t.folder))
    head = ("method", "rate", "seed of the order", "of the start", "steps", "validation loss", "ending", "folder")
    return TextTable("Runs", head, rows)


def _last_loss(trial: Trial) -> str:
    if not trial.curve:
        return ""
    loss = trial.curve[-1][1]
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{inner}", text) for inner, text in settings(value)]
        else:
            rows.append((key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)))
    return rows


def as_record(found: Findings) -> dict[str, Any]:
    """The results as JSON: numbers without an interval have null for its ends."""
    return {
        "format": _VERSION,
        "verdict": verdict(found),
        "remarks": [*remarks(found)],
        "measure": found.measure,
        "reference": found.reference or None,
        "best": found.best or None,
        "base_loss": found.base,
        "methods": [_standing_record(found, standing) for standing in found.standings],
        "left_out": dict(found.comparison.left_out),
    }


def _standing_record(found: Findings, s: Standing) -> dict[str, Any]:
    given: Cost | None = found.comparison.costs.get(s.arm)
    seconds, forward, merged = (
        quartiles(getattr(given, key, ())) for key in ("step_seconds", "forward", "merged_forward")
    )
    return {
        "name": s.arm,
        "lr": s.lr,
        "not_tuned": s.untuned or None,
        "seeds": s.seeds,
        "diverged": s.diverged,
        "loss": _interval_record(s.loss),
        "accuracy": _interval_record(s.accuracy),
        "forgotten": _interval_record(s.forgotten),
        "against_reference": _difference_record(found.against_reference.get(s.arm)),
        "against_best": _difference_record(found.against_best.get(s.arm)),
        "trained": given.trained if given else None,
        "file_bytes": given.file_bytes if given else None,
        "peak_bytes": given.peak_bytes if given else None,
        "step_seconds": seconds[1] if seconds else None,
        "forward_over_base": forward[1] if forward else None,
        "merged_forward_over_base": merged[1] if merged else None,
        "merge": given.merge if given else None,
        "merge_note": given.merge_note or None if given else None,
        "engines": dict(given.engines) if given else {},
        "context": given.context if given else None,
    }


def _interval_record(interval: Interval | None) -> dict[str, float | None] | None:
    if interval is None:
        return None
    ends = (interval.low, interval.high) if interval.known else (None, None)
    return {"value": interval.value, "low": ends[0], "high": ends[1]}


def _difference_record(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    of_pair, joint = _interval_record(difference.pair), _interval_record(difference.joint)
    return {"verdict": difference.verdict, "why": difference.why or None, "pair": of_pair, "joint": joint}


def quartiles(of: Sequence[float]) -> tuple[float, float, float] | None:
    """The lower quartile, the median and the upper quartile; None of nothing."""
    if not of:
        return None
    low, middle, high = np.quantile(of, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


_METHOD: Column = ("method", lambda s: s.arm)
_RATE: Column = ("best rate", rate)
_SEEDS: Column = ("seeds, sd", lambda s: str(s.seeds or "") + ("" if math.isnan(s.spread) else f", {s.spread:.3f}"))


def _measures(found: Findings) -> Iterator[Column]:
    yield "held-out loss", lambda s: level(s.loss)
    if found.measure == "accuracy":
        yield "accuracy", lambda s: level(s.accuracy, "accuracy")


def _against(found: Findings) -> Iterator[Column]:
    for name, others in ((found.reference, found.against_reference), (found.best, found.against_best)):
        if others:
            what = name if name == found.reference else f"the best, {name}"
            yield f"difference from {what}", _differences(others, found)
            yield "verdict", lambda s, others=others: others[s.arm].verdict if s.arm in others else ""  # type: ignore[misc]
        if found.reference == found.best:
            return


def _differences(others: Mapping[str, Difference], found: Findings) -> Callable[[Standing], str]:
    return lambda s: change(others[s.arm].joint, found.measure) if s.arm in others else ""


def _forgetting(found: Findings) -> Iterator[Column]:
    if any(s.forgotten for s in found.standings):
        yield "forgotten", lambda s: change(s.forgotten)


def _diverged(found: Findings) -> Iterator[Column]:
    if any(s.diverged for s in found.standings):
        yield "diverged", lambda s: f"{s.diverged} of {s.seeds + s.diverged}" if s.diverged else ""


def _costs(found: Findings, *, short: bool = False) -> Iterator[Column]:
    known = found.comparison.costs.values()
    if not known:
        return
    yield "trained numbers", _of(found, lambda c: f"{c.trained:,}")
    yield "file", _of(found, lambda c: human_bytes(c.file_bytes))
    yield "peak memory", _of(found, lambda c: human_bytes(c.peak_bytes))
    yield "seconds per step", _of(found, lambda c: _times(c.step_seconds, short))
    if short:
        return
    if any(c.forward for c in known):
        yield "forward pass / base", _of(found, lambda c: _times(c.forward))
    if any(c.merged_forward for c in known):
        yield "merged / base", _of(found, lambda c: _times(c.merged_forward))
    if any(c.context for c in known):
        yield "context taken", _of(found, lambda c: str(c.context))


def _of(found: Findings, text: Callable[[Cost], str]) -> Callable[[Standing], str]:
    """The text of a method's cost; empty if that is not known."""
    known = found.comparison.costs
    return lambda s: text(known[s.arm]) if s.arm in known else ""


def _times(of: Sequence[float], short: bool = False) -> str:
    if (found := quartiles(of)) is None:
        return ""
    low, middle, high = (f"{value:#.3g}".rstrip(".") for value in found)
    return middle if short else f"{middle} [{low}, {high}]"


def _served(given: Cost, engine: str) -> str:
    return "" if engine not in given.engines else "no" if given.engines[engine] else "yes"


def _table(
    title: str,
    found: Findings,
    columns: Sequence[Column],
    arms: Collection[str] = (),
    bottom: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> TextTable:
    shown = [s for s in found.standings if not arms or s.arm in arms]
    rows = [[text(standing) for _, text in columns] for standing in shown]
    return TextTable(title, [name for name, _ in columns], [*rows, *bottom], notes)


def _rank(arm: Arm) -> int | None:
    """The rank of an arm, or that of its presets by default; None for a method without one."""
    if isinstance(r := arm.method.get("r"), int):
        return r
    name = arm.method.get("name", ())
    try:
        delta = method(*([name] if isinstance(name, str) else name)).delta
    except LoraryError:
        return None  # of a later version, or of a plugin
    return getattr(delta, "r", None) or None


def _trained(found: Findings, arm: str) -> int:
    given = found.comparison.costs.get(arm)
    return given.trained if given else 0
