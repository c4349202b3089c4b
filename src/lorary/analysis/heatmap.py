"""Heat maps of layers x module kinds: the rank of every site, or its share of what a probe has learnt.

Every cell says its number; the shade repeats it. Long models go on in further bands below, so that the numbers stay
readable at the width of a page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorary.analysis.svg import cell, cell_axes, style, to_svg
from lorary.layers.module_kinds import ModulePosition, module_positions
from lorary.methods.lora_drop import Importance
from lorary.model.plan import Plan

MOST_COLUMNS = 32  # in one band
_WIDE, _HIGH, _LETTER, _NARROWEST = 0.29, 0.24, 0.078, 4.9  # inches


@dataclass(frozen=True)
class _Shown:
    """The text of one cell, its shade from 0 to 1, and whether it is framed."""

    text: str
    shade: float
    framed: bool = False


def ranks_svg(ranks: Mapping[str, int], r: int, title: str = "Rank of every layer") -> str:
    """The ranks that the sites ended with, as one `<svg>` element.

    Args:
        ranks: site -> its rank.
        r: the rank that all began with: the full shade.
        title: the picture's name; plain text.

    Returns:
        SVG without an external reference, the same bytes for the same numbers.

    >>> svg = ranks_svg({"layers.0.q": 3, "layers.1.q": 0, "head": 4}, r=4)
    >>> svg.startswith("<svg")
    True
    """
    shown = {site: _Shown(str(k), min(k / max(r, 1), 1.0)) for site, k in ranks.items()}
    total = f"{sum(ranks.values()):,} of {r * len(ranks):,} directions are left in {len(ranks)} sites"
    gone = sum(k == 0 for k in ranks.values())
    total += f"; none in {gone} of them" if gone else ""
    return _heatmap(shown, title, f"{total}. The darker, the nearer to {r}.", total)


def importance_svg(importance: Importance, plan: Plan, title: str = "Importance of every layer") -> str:
    """Every layer's share of what a probe has learnt, in percent of its module kind; the layers kept are framed.

    Args:
        importance: of the plan's sites.
        plan: the result of `lorary.drop_layers`: sites without a share have tensors of their own.
        title: the picture's name; plain text.

    Returns:
        As `ranks_svg`.
    """
    within, own = importance.within, {p.site.name for p in plan.sites if not p.share}
    most: dict[str, float] = {}
    kinds = module_positions(within)
    for site, place in kinds.items():
        most[place.kind] = max(most.get(place.kind, 0.0), within[site])
    shown = {
        site: _Shown(_percent(value), value / (most[kinds[site].kind] or 1.0), site in own)
        for site, value in within.items()
    }
    caption = (
        "Percent of the sum of |s B A x|\N{SUPERSCRIPT TWO} over a module kind: every row adds up to 100. "
        "Framed: a LoRA of its own; the others share one with their kind."
    )
    return _heatmap(shown, title, caption, f"{len(own)} of {len(within)} layers have tensors of their own")


def _percent(share: float) -> str:
    """At most four characters: 0.3, 12, 100."""
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _heatmap(shown: Mapping[str, _Shown], title: str, caption: str, description: str) -> str:
    """The picture.

    Args:
        shown: site -> its cell.
        title: above it.
        caption: below it.
        description: the picture in words.
    """
    at = {place: shown[site] for site, place in module_positions(shown).items()}
    bands = _bands(at)
    rows = [list(dict.fromkeys(place.kind for place in at if place.layer in band)) for band in bands]
    names = _LETTER * max([len(place.kind) for place in at], default=0) + 0.2  # inches
    width = max(max(map(len, bands)) * _WIDE + names, _NARROWEST)
    caption = textwrap.fill(caption, int(width / _LETTER))
    height = 0.75 + 0.17 * caption.count("\n") + sum(0.34 + _HIGH * len(kinds) for kinds in rows)
    with style():
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.supxlabel(caption, x=0.01, ha="left", size=9)
        ratios = [max(len(kinds), 1) for kinds in rows]
        grid = figure.subplots(len(bands), squeeze=False, height_ratios=ratios)[:, 0]
        for axes, band, kinds in zip(grid, bands, rows, strict=True):
            _band(axes, at, band, kinds, (width - names) / _WIDE)
        return to_svg(figure, title, description)


def _bands(at: Mapping[ModulePosition, _Shown]) -> list[list[tuple[int, ...]]]:
    """The layers, in as few bands as possible, all of about one width; those that have no number come last."""
    layers = sorted({place.layer for place in at if place.layer})
    count = max(-(-len(layers) // MOST_COLUMNS), 1)
    size = -(-len(layers) // count)
    bands = [layers[i * size : (i + 1) * size] for i in range(count)]
    bands[-1] += [()] * any(not place.layer for place in at)
    return bands


def _band(
    axes: Axes,
    at: Mapping[ModulePosition, _Shown],
    band: Sequence[tuple[int, ...]],
    kinds: Sequence[str],
    columns: float,
) -> None:
    """A stretch of layers, in as much room as so many columns take: cells of all bands are as large."""
    cell_axes(axes, columns, max(len(kinds), 1))
    axes.xaxis.tick_top()
    names = [".".join(map(str, layer)) or "\N{EN DASH}" for layer in band]
    axes.set_xticks([i + 0.5 for i in range(len(band))], names, size=8)
    axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds, size=9)
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(band):
            if found := at.get(ModulePosition(kind, layer)):
                cell(axes, x, y, found.text, found.shade, framed=found.framed)
