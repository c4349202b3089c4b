"""The loss curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorary.analysis.svg import line, style, to_svg

MOST_POINTS = 1000  # longer curves are drawn as means of neighbouring points, for small files

Points = list[tuple[float, float]]


def loss_svg(history: Sequence[Mapping[str, object]], title: str = "Loss") -> str:
    """The training and held-out loss of a run, as one `<svg>` element.

    Args:
        history: the records of `metrics.jsonl`, in order. `step` (number of optimizer steps) and `loss` are a point of
            the training curve, `step` and `eval_loss` of the held-out one; other records are ignored.
        title: plain text.

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
        axes.set(title=title, xlabel="optimizer step", ylabel="loss")
        _curve(axes, 0, train, "train", marker=len(train) == 1)
        _curve(axes, 1, held_out, "held out")
        if train or held_out:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no loss was logged", ha="center", transform=axes.transAxes)
        return to_svg(figure, title, _description(train, held_out))


def _points(history: Sequence[Mapping[str, object]], key: str) -> Points:
    """The (step, value) pairs of one curve; non-finite values leave a gap."""
    points = [
        (float(step), float(value))
        for record in history
        if isinstance(step := record.get("step"), int | float) and isinstance(value := record.get(key), int | float)
    ]
    return [(step, value if math.isfinite(value) else math.nan) for step, value in points]


def _curve(axes: Axes, i: int, points: Points, label: str, marker: bool = True) -> None:
    if not points:
        return
    size = math.ceil(len(points) / MOST_POINTS)
    if size > 1:
        label = f"{label} (means of {size})"
    thinned = [_mean(points[k : k + size]) for k in range(0, len(points), size)]
    axes.plot(*zip(*thinned, strict=True), label=label, **line(i, marker))


def _mean(points: Points) -> tuple[float, float]:
    steps, values = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)


def _description(train: Points, held_out: Points) -> str:
    parts = []
    for name, points in (("train loss", train), ("held-out loss", held_out)):
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} from {start:.3f} at step {first:g} to {end:.3f} at step {last:g}")
    return "; ".join(parts) or "no loss was logged"
