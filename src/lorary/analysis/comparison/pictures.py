"""The pictures of a comparison, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from lorary.analysis.comparison.record import Comparison, Cost, Scores, Trial
from lorary.analysis.comparison.statistics import Difference, Findings, Verdict, chosen_rate, judged_runs
from lorary.analysis.comparison.words import change, names, signed
from lorary.analysis.svg import INK, PALETTE, line, style, to_svg

MOST_CURVES = 8  # with a colour of their own; the others are thin
_LONGEST_NAME = 24
_MARKS: dict[Verdict, dict[str, Any]] = {
    "better": {"color": PALETTE[2], "marker": "D"},
    "worse": {"color": PALETTE[1], "marker": "s"},
    "no difference shown": {"color": PALETTE[0], "marker": "o"},
    "not judged": {"color": INK, "marker": "x"},
}


def differences_svg(found: Findings, others: Mapping[str, Difference]) -> str:
    """The differences of all methods from one, with both intervals: a forest plot.

    Args:
        found: the results.
        others: arm -> its difference from the reference, or from the best; not empty.
    """
    shown = sorted(others.values(), key=lambda d: d.pair.value, reverse=found.measure == "accuracy")
    scale = 100 if found.measure == "accuracy" else 1
    left, right = (scale * end for end in _axis(shown))
    reference = short(shown[0].reference)
    with style():
        figure = Figure(figsize=(7.2, 0.95 + 0.3 * len(shown)))
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1)
        for y, d in enumerate(shown):
            _difference(axes, y, d, scale, (left, right))
        axes.set(xlim=(left, right), ylim=(len(shown) - 0.5, -0.5))
        axes.set_yticks(range(len(shown)), [short(d.arm) for d in shown])
        axes.grid(visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        if found.measure == "accuracy":
            axes.set_xlabel(f"accuracy minus that of {reference} (percentage points); right is better")
        else:
            axes.set_xlabel(f"held-out loss minus that of {reference} (nats per token); left is better")
        words = (f"{d.arm} {change(d.joint, found.measure)}, {d.verdict}" for d in shown)
        return to_svg(figure, f"Differences from {shown[0].reference}", "; ".join(words))


def rates_svg(found: Findings, arm: str) -> str:
    """The validation loss of a method at the end of its runs over their learning rate; all methods on the same axis."""
    comparison, chosen = found.comparison, chosen_rate(found.comparison, arm)
    runs = comparison.of(arm)
    low, high = _losses_at_the_end(comparison)
    ended: dict[float, list[float]] = {}
    for run in runs:
        if run.ending == "finished" and math.isfinite(loss := _last(run)):
            ended.setdefault(run.lr, []).append(loss)
    means = {lr: sum(losses) / len(losses) for lr, losses in sorted(ended.items())}
    with style():
        figure = Figure(figsize=(3.6, 2.3))
        axes = figure.add_subplot()
        axes.set(title=short(arm), xscale="log", xlabel="learning rate", ylabel="validation loss")
        axes.plot([*means], [*means.values()], **line(0))
        for lr, losses in ended.items():
            axes.plot([lr] * len(losses), losses, ".", color=PALETTE[0], alpha=0.6)
        if chosen in means:
            axes.plot([chosen], [means[chosen]], "o", color=PALETTE[1], markersize=11, markerfacecolor="none")
        stopped = {run.lr: run.ending for run in runs if run.lr not in means}
        for lr, ending in stopped.items():
            axes.annotate(ending, (lr, high), rotation=90, ha="center", va="top", fontsize=8)
        axes.set_ylim(low, high)
        _few_rates(axes, sorted({run.lr for run in runs}))
        words = [f"{loss:.3f} at {lr:.3g}" for lr, loss in means.items()]
        words += [f"{ending} at {lr:.3g}" for lr, ending in stopped.items()]
        return to_svg(figure, f"Learning rates of {arm}", "; ".join(words) or "no run")


def curves_svg(found: Findings) -> str:
    """The validation loss of every method over the optimizer steps at its best rate, as the mean over its seeds."""
    curves = {s.arm: curve for s in found.standings if (curve := _mean_curve(found.comparison, s.arm))}
    with style():
        figure = Figure(figsize=(7.2, 3.8))
        axes = figure.add_subplot()
        axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
        for i, (arm, points) in enumerate(curves.items()):
            look = line(i) if i < MOST_CURVES else {"color": INK, "alpha": 0.3, "linewidth": 0.8}
            label = "the others" if i == MOST_CURVES else _label(arm) if i < MOST_CURVES else "_"
            axes.plot(*zip(*points, strict=True), label=label, **look)
        if curves:
            axes.legend(ncols=2)
        words = (f"{arm} ends at {points[-1][1]:.3f}" for arm, points in curves.items())
        return to_svg(figure, "Validation loss over the steps", "; ".join(words) or "no run")


def trade_off_svg(found: Findings, size: Callable[[Cost], int], label: str) -> str:
    """Held-out loss or accuracy over a size, with the methods that no other one beats in both.

    Args:
        found: the results.
        size: the size of a method, on the logarithmic axis; methods of size 0 are left out.
        label: of the size.
    """
    known = found.comparison.costs
    sizes = {s.arm: size(known[s.arm]) for s in found.standings if s.loss is not None and s.arm in known}
    points = {arm: (x, *_by_seed(found, arm)) for arm, x in sizes.items() if x > 0}
    high_is_good = found.measure == "accuracy"
    stable = [s.arm for s in found.standings if s.arm in points and not s.diverged]
    front = _front({arm: (points[arm][0], -points[arm][1] if high_is_good else points[arm][1]) for arm in stable})
    with style():
        figure = Figure(figsize=(4.8, max(3.2, 1.0 + 0.2 * len(points))))
        axes = figure.add_subplot()
        axes.set(xscale="log", xlabel=label, ylabel="accuracy (%)" if high_is_good else "held-out loss")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if front:
            corners = [points[arm][:2] for arm in front]
            axes.step(*zip(*corners, strict=True), where="post", color=INK, alpha=0.4, linewidth=1, linestyle="--")
        for arm, (x, y, low, high) in points.items():
            colour = PALETTE[2] if arm in front else PALETTE[0]
            axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
            axes.plot([x], [y], marker="D" if arm in front else "o", color=colour, markersize=5)
        _names_beside(axes, {arm: point[:2] for arm, point in points.items()})
        words = f"not beaten in both: {names(front)}" if front else "no method has both"
        return to_svg(figure, f"{label} and quality", words)


def short(name: str) -> str:
    """A name that fits into a picture.

    >>> short("the-long-name-of-the-method-12")
    'the-long-nam…e-method-12'
    """
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"


def _label(name: str) -> str:
    """A name in a legend, which leaves out what begins with an underscore."""
    return f" {short(name)}" if name.startswith("_") else short(name)


def _difference(axes: Axes, y: int, d: Difference, scale: float, ends: tuple[float, float]) -> None:
    """One row of a forest plot; beyond the axis an arrow and the number."""
    look, value, (left, right) = _MARKS[d.verdict], scale * d.pair.value, ends
    if left <= value <= right:
        for interval, width in ((d.joint, 1.2), (d.pair, 4.0)):
            if interval.known:
                bar = [scale * interval.low, scale * interval.high]
                axes.plot(bar, [y, y], color=look["color"], linewidth=width, solid_capstyle="butt")
        axes.plot([value], [y], linestyle="", markersize=7, **look)
    else:
        above = value > right
        end, inwards, arrow = (right, left - right, ">") if above else (left, right - left, "<")
        axes.plot([end + 0.01 * inwards], [y], color=look["color"], marker=arrow, markersize=6)
        number = signed(value, 1 if scale > 1 else 3)
        axes.text(end + 0.03 * inwards, y, number, ha="right" if above else "left", va="center_baseline", fontsize=9)
    axes.annotate(d.verdict, (1.02, y), xycoords=("axes fraction", "data"), va="center_baseline", fontsize=9)


def _axis(shown: Sequence[Difference]) -> tuple[float, float]:
    """The ends of a forest plot's axis: a few very bad methods must not hide what the others do."""
    bars = [(d.joint.low, d.joint.high) if d.joint.known else (d.pair.value, d.pair.value) for d in shown]
    low, high = min(0.0, *(low for low, _ in bars)), max(0.0, *(high for _, high in bars))
    undecided = [max(-a, b) for (a, b), d in zip(bars, shown, strict=True) if d.verdict == "no difference shown"]
    halves = [(b - a) / 2 for a, b in bars if b > a]
    farthest = max([*undecided, 8 * float(np.median(halves))]) if halves else max(-low, high)
    low, high = max(low, -farthest), min(high, farthest)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _last(run: Trial) -> float:
    return run.curve[-1][1] if run.curve else math.nan


def _losses_at_the_end(comparison: Comparison) -> tuple[float, float]:
    """The axis of all pictures of rates: up to the loss before the first step, beyond which nothing matters."""
    ends = [_last(run) for run in comparison.trials if run.ending == "finished"]
    starts = [run.curve[0][1] for run in comparison.trials if run.curve and math.isfinite(run.curve[0][1])]
    finite = [loss for loss in ends if math.isfinite(loss)]
    if not finite:
        return 0.0, max(starts, default=1.0)
    low, high = min(finite), max(finite)
    high = min(high, max(low, *starts)) if starts else high
    room = 0.08 * (high - low) or 0.05
    return low - room, high + room


def _few_rates(axes: Axes, rates: Sequence[float]) -> None:
    """The tried rates as the ticks; every second one if they are many."""
    ticks = rates if len(rates) <= 4 else rates[::2]
    axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
    axes.set_xticks([], minor=True)
    if rates:
        axes.set_xlim(rates[0] / 1.6, rates[-1] * 1.6)


def _mean_curve(comparison: Comparison, arm: str) -> list[tuple[int, float]]:
    """The mean over the runs at the best rate, at the steps that all of them have."""
    lr = chosen_rate(comparison, arm)
    runs = judged_runs(comparison, arm) or [r for r in comparison.of(arm) if r.lr == lr and r.ending == "finished"]
    curves = [dict(run.curve) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]


def _by_seed(found: Findings, arm: str) -> tuple[float, float, float]:
    """The mean of an arm's measure over its seeds, the lowest and the highest."""

    def measure(scores: Scores) -> float:
        return 100 * scores.accuracy if found.measure == "accuracy" else scores.loss

    values = [measure(run.test) for run in judged_runs(found.comparison, arm) if run.test is not None]
    return sum(values) / len(values), min(values), max(values)


def _front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points that no other one beats or equals in both numbers, the smallest first.

    >>> _front({"a": (1, 5), "b": (2, 4), "c": (3, 4.5)})
    ['a', 'b']
    """
    kept: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: item[1]):
        if not kept or y < points[kept[-1]][1]:
            kept.append(name)
    return kept


def _names_beside(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """The names of points in a column at the right, each with a line to its point, none over another."""
    if not points:
        return
    low, high = axes.get_ylim()
    order = sorted(points, key=lambda name: points[name][1])
    places = spread([(points[name][1] - low) / (high - low) for name in order], 1 / max(13.0, len(points) + 1.0))
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            short(name),
            points[name],
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": INK, "alpha": 0.4, "shrinkB": 4},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places between 0 and 1, moved as little as a gap between neighbours needs.

    >>> spread([0.5, 0.5, 1.0], 0.25)
    [0.5, 0.75, 1.0]
    >>> spread([0.9, 0.95], 0.25)
    [0.75, 1.0]
    """
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else place)
    limit = 1.0
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found
