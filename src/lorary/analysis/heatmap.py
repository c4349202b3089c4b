"""Heat maps of layers x module kinds: the rank of every site, its importance, or any other figure.

Every cell shows its number and a shade. Long models continue in further bands below, so that the numbers stay readable
at the width of a page.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorary.analysis.svg import cell, cell_axes, style, to_svg
from lorary.layers.module_kinds import ModulePosition, module_positions
from lorary.methods.lora_drop import Importance
from lorary.model.plan import Plan

MOST_COLUMNS = 32  # in one band
_CELL_WIDTH, _CELL_HEIGHT, _LETTER, _MIN_WIDTH = 0.29, 0.24, 0.078, 4.9  # inches


@dataclass(frozen=True)
class _Cell:
    """One cell: its text, its shade from 0 to 1, and whether it is framed."""

    text: str
    shade: float
    framed: bool = False


def ranks_svg(ranks: Mapping[str, int], r: int, title: str = "Rank of every layer") -> str:
    """The final ranks of the sites, as one `<svg>` element.

    Args:
        ranks: site -> its rank.
        r: the initial rank of all: the full shade.
        title: plain text.

    Returns:
        SVG without external references, the same bytes for the same numbers.

    >>> svg = ranks_svg({"layers.0.q": 3, "layers.1.q": 0, "head": 4}, r=4)
    >>> svg.startswith("<svg")
    True
    """
    cells = {site: _Cell(str(k), min(k / max(r, 1), 1.0)) for site, k in ranks.items()}
    total = f"{sum(ranks.values()):,} of {r * len(ranks):,} directions remain in {len(ranks)} sites"
    empty = sum(k == 0 for k in ranks.values())
    total += f"; none in {empty} of them" if empty else ""
    return _heatmap(cells, title, f"{total}. Darker: nearer to {r}.", total)


def importance_svg(importance: Importance, plan: Plan, title: str = "Importance of every layer") -> str:
    """The importance of every layer in percent of its module kind; layers that keep their own tensors are framed.

    Args:
        importance: of the plan's sites.
        plan: the result of `lorary.drop_layers`: sites without a share have their own tensors.
        title: plain text.

    Returns:
        As `ranks_svg`.
    """
    within, kept = importance.within, {site.site.name for site in plan.sites if not site.share}
    largest: dict[str, float] = {}
    positions = module_positions(within)
    for site, position in positions.items():
        largest[position.kind] = max(largest.get(position.kind, 0.0), within[site])
    cells = {
        site: _Cell(_percent(value), value / (largest[positions[site].kind] or 1.0), site in kept)
        for site, value in within.items()
    }
    caption = (
        "Percent of the sum of |s B A x|\N{SUPERSCRIPT TWO} over a module kind: every row adds up to 100. "
        "Framed: its own LoRA; the others share one with their kind."
    )
    return _heatmap(cells, title, caption, f"{len(kept)} of {len(within)} layers have tensors of their own")


def values_svg(
    values: Mapping[str, float],
    title: str,
    caption: str,
    *,
    text: Callable[[float], str] = "{:.3g}".format,
    full_shade: float | None = None,
) -> str:
    """A figure of every site: the darker, the larger.

    Args:
        values: site -> its figure, at least 0; one that is not finite has no shade.
        title: plain text.
        caption: below the heat map.
        text: of a figure: at most four characters.
        full_shade: the figure with the full shade; None for the largest one.

    Returns:
        As `ranks_svg`.
    """
    known = [value for value in values.values() if math.isfinite(value)]
    largest = full_shade or max(known, default=0.0) or 1.0
    shades = {site: min(value / largest, 1.0) if math.isfinite(value) else 0.0 for site, value in values.items()}
    cells = {site: _Cell(text(value), shades[site]) for site, value in values.items()}
    worst = max(values, key=lambda site: shades[site], default=None)
    most = f"; the largest is {text(values[worst])} at {worst}" if worst is not None else ""
    return _heatmap(cells, title, caption, f"{len(values)} sites{most}")


def percent(share: float) -> str:
    """A share in percent, without its sign, in at most four characters: 0.03, 1.2, 35, 100."""
    return f"{100 * share:.2g}" if 0 < share < 0.00995 else _percent(share)


def _percent(share: float) -> str:
    """At most four characters: 0.3, 12, 100."""
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _heatmap(cells: Mapping[str, _Cell], title: str, caption: str, description: str) -> str:
    """A heat map.

    Args:
        cells: site -> its cell.
        title: above the heat map.
        caption: below it.
        description: for readers who do not see it.
    """
    at = {position: cells[site] for site, position in module_positions(cells).items()}
    bands = _bands(at)
    rows = [list(dict.fromkeys(position.kind for position in at if position.layer in band)) for band in bands]
    names = _LETTER * max([len(position.kind) for position in at], default=0) + 0.2  # inches
    width = max(max(map(len, bands)) * _CELL_WIDTH + names, _MIN_WIDTH)
    caption = textwrap.fill(caption, int(width / _LETTER))
    height = 0.75 + 0.17 * caption.count("\n") + sum(0.34 + _CELL_HEIGHT * len(kinds) for kinds in rows)
    with style():
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.supxlabel(caption, x=0.01, ha="left", size=9)
        ratios = [max(len(kinds), 1) for kinds in rows]
        grid = figure.subplots(len(bands), squeeze=False, height_ratios=ratios)[:, 0]
        for axes, band, kinds in zip(grid, bands, rows, strict=True):
            _band(axes, at, band, kinds, (width - names) / _CELL_WIDTH)
        return to_svg(figure, title, description)


def _bands(at: Mapping[ModulePosition, _Cell]) -> list[list[tuple[int, ...]]]:
    """The layers in as few bands as possible, all of about one width; modules without a layer number come last."""
    layers = sorted({position.layer for position in at if position.layer})
    count = max(-(-len(layers) // MOST_COLUMNS), 1)
    size = -(-len(layers) // count)
    bands = [layers[i * size : (i + 1) * size] for i in range(count)]
    bands[-1] += [()] * any(not position.layer for position in at)
    return bands


def _band(
    axes: Axes,
    at: Mapping[ModulePosition, _Cell],
    band: Sequence[tuple[int, ...]],
    kinds: Sequence[str],
    columns: float,
) -> None:
    """One band of layers, as wide as `columns` cells, so that the cells of all bands have the same size."""
    cell_axes(axes, columns, max(len(kinds), 1))
    axes.xaxis.tick_top()
    names = [".".join(map(str, layer)) or "\N{EN DASH}" for layer in band]
    axes.set_xticks([i + 0.5 for i in range(len(band))], names, size=8)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, size=9)
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(band):
            if shown := at.get(ModulePosition(kind, layer)):
                cell(axes, x, y, shown.text, shown.shade, framed=shown.framed)
