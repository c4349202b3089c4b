"""Pictures of a search for the weights of adapters: the weights as bars, and the loss of every candidate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorary.adapters.compose.lorahub import WeightSearch
from lorary.analysis.svg import INK, PALETTE, line, style, to_svg

_MOST_LETTERS = 32  # of a name beside a bar
_ROW = 0.34  # inches of a bar


def weights_svg(names: Sequence[str], weights: Sequence[float], title: str = "Weights") -> str:
    """The weight of every adapter as a bar with its number, as one `<svg>` element.

    Args:
        names: of the adapters.
        weights: of each.
        title: plain text.

    >>> weights_svg(["a", "b"], [0.7, -0.2]).startswith("<svg")
    True
    """
    shown = [name if len(name) <= _MOST_LETTERS else "..." + name[3 - _MOST_LETTERS :] for name in names]
    reach = max([abs(w) for w in weights if math.isfinite(w)], default=0.0) or 1.0
    with style():
        figure = Figure(figsize=(7.2, 1.1 + _ROW * len(names)))
        axes = figure.add_subplot()
        places = range(len(names))
        colours = [PALETTE[0] if w >= 0 else PALETTE[1] for w in weights]
        axes.barh(places, weights, height=0.62, color=colours)
        for y, w in zip(places, weights, strict=True):  # beside the bar's end, away from zero
            axes.annotate(
                f"{w:+.3f}", (w, y), (4 if w >= 0 else -4, 0), textcoords="offset points", va="center_baseline",
                ha="left" if w >= 0 else "right", fontsize=9,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(title=title, xlabel="weight", xlim=(-1.25 * reach, 1.25 * reach), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(places, labels=shown)
        axes.grid(visible=False)
        description = "; ".join(f"{name} {w:+.3f}" for name, w in zip(names, weights, strict=True))
        return to_svg(figure, title, description)


def search_svg(found: WeightSearch, title: str = "Search") -> str:
    """The objective of every candidate and the least so far, as one `<svg>` element."""
    ranks = [candidate.rank() for candidate in found.candidates]
    shown = [value if math.isfinite(value) else math.nan for value in ranks]
    least = [min(ranks[: i + 1]) for i in range(len(ranks))]
    tried = range(1, len(ranks) + 1)
    with style():
        figure = Figure(figsize=(7.2, 3.0))
        axes = figure.add_subplot()
        axes.plot(tried, shown, label="a candidate", **line(0) | {"linestyle": "none"})
        axes.plot(tried, least, label="the best so far", drawstyle="steps-post", **line(1, marker=False))
        axes.set(title=title, xlabel="candidate", ylabel="loss + penalty")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        known = sorted(value for value in ranks if math.isfinite(value))
        usual = max(known[int(0.8 * (len(known) - 1))], ranks[0])
        if known[-1] - known[0] > 3 * (usual - known[0]) > 0:  # a few far above all others would flatten the rest
            axes.set_ylim(known[0] - 0.1 * (usual - known[0]), usual + 0.3 * (usual - known[0]))
        text = f"{ranks[0]:.3f} with all weights zero, {least[-1]:.3f} at the end"
        return to_svg(figure, title, f"{len(ranks)} candidates: {text}")
