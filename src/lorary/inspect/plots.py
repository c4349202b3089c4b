"""Pictures of a run as SVG text: the same numbers give the same bytes; they read on light and dark pages."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

MOST_POINTS = 1000  # more are drawn as means of neighbours: the eye sees no difference, the file does

INK = "#123456"  # drawn, then replaced by `currentColor`: axes and words take the page's own text colour
_TRAIN, _EVAL = "#2f7ebc", "#d97706"  # both at least 3:1 against white and against a dark page

STYLE = {
    "svg.hashsalt": "lorary",  # otherwise element ids are random
    "svg.fonttype": "none",  # text stays text: selectable, searchable, read aloud
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

# A picture opened by itself or shown as an image has no page to take its colour from.
_COLOURS = (
    "<style>.lorary-plot{color-scheme:light dark;color:#1f2328}"
    "@media (prefers-color-scheme:dark){.lorary-plot{color:#e6e6e6}}"
    "@media print{.lorary-plot{color:#000}}</style>"
)

Points = list[tuple[float, float]]


def loss_svg(history: Sequence[Mapping[str, object]], title: str = "Loss") -> str:
    """The loss of a run over its optimizer steps, as one `<svg>` element.

    Args:
        history: the run's records in order, as `metrics.jsonl` holds them. A record with `step` (number of
            optimizer steps) and `loss` is a point of the training curve, one with `step` and `eval_loss` of
            the held-out one; other records and other keys are passed over.
        title: what the picture is called; plain text.

    Returns:
        SVG without a date, an external reference or a fixed background: it can be written to a file or put
        into a page as it is.

    >>> svg = loss_svg([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "eval_loss": 2.7}])
    >>> svg.startswith("<svg"), "held out" in svg
    (True, True)
    """
    train, held_out = _points(history, "loss"), _points(history, "eval_loss")
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", parse_math=False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
        _curve(axes, train, "train", _TRAIN, "-", marker="o" if len(train) == 1 else "")
        _curve(axes, held_out, "held out", _EVAL, "--", marker="o")
        if train or held_out:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no loss was logged", ha="center", transform=axes.transAxes)
        return svg(figure, title, _description(train, held_out))


def _points(history: Sequence[Mapping[str, object]], key: str) -> Points:
    """The (step, value) pairs of one curve; a value that is not finite leaves a gap."""
    points = [
        (float(step), float(value))
        for record in history
        if isinstance(step := record.get("step"), int | float) and isinstance(value := record.get(key), int | float)
    ]
    return [(step, value if math.isfinite(value) else math.nan) for step, value in points]


def _curve(axes: Axes, points: Points, label: str, colour: str, line: str, marker: str) -> None:
    if not points:
        return
    size = math.ceil(len(points) / MOST_POINTS)
    if size > 1:
        label = f"{label} (means of {size})"
    thinned = [_mean(points[i : i + size]) for i in range(0, len(points), size)]
    steps, losses = zip(*thinned, strict=True)
    axes.plot(steps, losses, line, color=colour, label=label, marker=marker, markersize=4, linewidth=1.6)


def _mean(points: Points) -> tuple[float, float]:
    steps, values = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)


def _description(train: Points, held_out: Points) -> str:
    """The picture in words, for those who do not see it."""
    parts = []
    for name, points in (("train loss", train), ("held-out loss", held_out)):
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} from {start:.3f} at step {first:g} to {end:.3f} at step {last:g}")
    return "; ".join(parts) or "no loss was logged"


def svg(figure: Figure, title: str, description: str) -> str:
    """A figure drawn in `STYLE` as one `<svg>` element.

    Args:
        figure: the figure.
        title: what it is called; plain text.
        description: what it shows, in words, for those who do not see it.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(text, metadata=nothing)
    made = text.getvalue()
    made = made[made.index("<svg") :].replace(INK, "currentColor")
    made = made.replace(">*{stroke", ">.lorary-plot *{stroke")  # a style in a page would reach all of it
    made = re.sub(r"\s*<metadata>.*?</metadata>", "", made, flags=re.DOTALL)
    # The size is a proportion: the picture is as wide as its place allows.
    made = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", made, count=1)
    head = f'<svg class="lorary-plot" role="img" aria-label="{escape(title)}: {escape(description)}" '
    made = made.replace("<svg ", head, 1)
    end_of_head = made.index(">") + 1
    return made[:end_of_head] + f"\n <title>{escape(title)}</title>\n {_COLOURS}" + made[end_of_head:]
