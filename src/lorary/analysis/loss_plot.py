"""The curves of a run over its optimizer steps: losses, and any other logged figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorary.analysis.svg import line, style, to_svg

MOST_POINTS = 1000  # longer curves are drawn as means of neighbouring points, for small files
FEW_POINTS = 20  # shorter curves are not smoothed

History = Sequence[Mapping[str, object]]
Points = list[tuple[float, float]]


def loss_svg(history: History, title: str = "Loss", *, unit: str = "", smooth: bool = False) -> str:
    """The training and held-out loss of a run, as one `<svg>` element.

    Args:
        history: the records of `metrics.jsonl`, in order. `step` (number of optimizer steps) and `loss` are a point of
            the training curve, `step` and `eval_loss` of the held-out one; other records are ignored.
        title: plain text.
        unit: of the loss, such as nats per token.
        smooth: draw the training loss as a moving average over its points, which are drawn faintly.

    Returns:
        SVG without a date or external references, for a file or for the inside of a page.

    >>> svg = loss_svg([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "eval_loss": 2.7}])
    >>> svg.startswith("<svg"), "held out" in svg
    (True, True)
    """
    train, held_out = _points(history, "loss"), _points(history, "eval_loss")
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})" if unit else "loss")
        if smooth and len(train) >= FEW_POINTS:
            _curve(axes, 0, train, "", marker=False, faint=True)
            _curve(axes, 0, smoothed(train), "train, moving average", marker=False)
        else:
            _curve(axes, 0, train, "train", marker=len(train) == 1)
        _curve(axes, 1, held_out, "held out")
        if train or held_out:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no loss was logged", ha="center", transform=axes.transAxes)
        return to_svg(
            figure, title, _description({"train loss": train, "held-out loss": held_out}, "no loss was logged", ".3f")
        )


def curves_svg(history: History, keys: Mapping[str, str], title: str, ylabel: str, height: float = 2.2) -> str:
    """Logged figures of a run over its steps, in one plot.

    Args:
        history: the records of `metrics.jsonl`.
        keys: key in the records -> label; keys that were never logged are left out.
        title: plain text.
        ylabel: with the unit.
        height: in inches; the width is 7.2.

    Returns:
        One `<svg>` element.

    >>> svg = curves_svg([{"step": 1, "grad_norm": 0.5}], {"grad_norm": "norm"}, "Gradient norm", "norm")
    >>> svg.startswith("<svg")
    True
    """
    curves = {label: points for key, label in keys.items() if (points := _points(history, key))}
    with style():
        figure = Figure(figsize=(7.2, height))
        axes = figure.add_subplot()
        axes.set(title=title, xlabel="optimizer step", ylabel=ylabel)
        for i, (label, points) in enumerate(curves.items()):
            _curve(axes, i, points, label, marker=len(points) == 1)
        if len(curves) > 1:
            axes.legend()
        return to_svg(figure, title, _description(curves, "nothing was logged"))


def smoothed(points: Points) -> Points:
    """The exponential moving average over the latest tenth of the points, without bias at the start.

    >>> smoothed([(1.0, 2.0), (2.0, 2.0)])
    [(1.0, 2.0), (2.0, 2.0)]
    """
    decay = 1 - 2 / (max(2.0, len(points) / 10) + 1)
    total = weight = 0.0
    means = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        means.append((step, total / weight if weight else math.nan))
    return means


def _points(history: History, key: str) -> Points:
    """The (step, value) pairs of one curve; non-finite values leave a gap."""
    points = [
        (float(step), float(value))
        for record in history
        if isinstance(step := record.get("step"), int | float) and isinstance(value := record.get(key), int | float)
    ]
    return [(step, value if math.isfinite(value) else math.nan) for step, value in points]


def _curve(axes: Axes, i: int, points: Points, label: str, marker: bool = True, faint: bool = False) -> None:
    if not points:
        return
    size = math.ceil(len(points) / MOST_POINTS)
    if size > 1 and label:
        label = f"{label} (means of {size})"
    thinned = [_mean(points[k : k + size]) for k in range(0, len(points), size)]
    look = line(i, marker) | ({"alpha": 0.5, "linewidth": 0.9} if faint else {})
    axes.plot(*zip(*thinned, strict=True), label=label or "_", **look)


def _mean(points: Points) -> tuple[float, float]:
    steps, values = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)


def _description(curves: Mapping[str, Points], otherwise: str, number: str = ".3g") -> str:
    parts = []
    for name, points in curves.items():
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} from {start:{number}} at step {first:g} to {end:{number}} at step {last:g}")
    return "; ".join(parts) or otherwise
