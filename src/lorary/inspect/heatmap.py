"""Layers x module kinds as a picture: the rank that each site ended with, or its share of what was learnt.

Every cell says its number; the shade repeats it. Long models go on in further bands below, so that the numbers stay
readable at the width of a page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorary.grid import Cell, cells
from lorary.inspect.canvas import Canvas
from lorary.methods.lora_drop import Importance
from lorary.plans import Plan

MOST_COLUMNS = 32  # in one band
_WIDE, _HIGH, _LEFT, _GAP = 30.0, 24.0, 16.0, 16.0
_FILL = "#3b82f6"  # up to this much of it: the number on it keeps its contrast on light and dark pages
_STRONGEST = 0.55


@dataclass(frozen=True)
class _Shown:
    """What one cell shows: its text, a shade from 0 to 1, and whether it is marked."""

    text: str
    shade: float
    marked: bool = False


def ranks_svg(ranks: Mapping[str, int], r: int, title: str = "Rank of every layer") -> str:
    """The ranks that the sites ended with, as one `<svg>` element.

    Args:
        ranks: site -> its rank.
        r: the rank that all began with: the full shade.
        title: what the picture is called; plain text.

    Returns:
        SVG without an external reference, the same bytes for the same numbers; it brings its own background.

    >>> svg = ranks_svg({"layers.0.q": 3, "layers.1.q": 0, "head": 4}, r=4)
    >>> svg.startswith("<svg")
    True
    """
    shown = {site: _Shown(str(k), min(k / max(r, 1), 1.0)) for site, k in ranks.items()}
    total = f"{sum(ranks.values()):,} of {r * len(ranks):,} directions are left in {len(ranks)} sites"
    gone = sum(k == 0 for k in ranks.values())
    total += f"; none in {gone} of them" if gone else ""
    return _Heatmap(shown).svg(title, [f"{total}. The darker, the nearer to {r}."], total)


def importance_svg(importance: Importance, plan: Plan, title: str = "Importance of every layer") -> str:
    """What a probe has learnt in each layer, in percent of its module kind, and which layers are kept.

    Args:
        importance: of the plan's sites.
        plan: what `lorary.drop_layers` has made of it: sites without a share have tensors of their own.
        title: what the picture is called; plain text.

    Returns:
        As `ranks_svg`.
    """
    within, own = importance.within, {p.site.name for p in plan.placed if not p.share}
    most: dict[str, float] = {}
    kinds = cells(within)
    for site, cell in kinds.items():
        most[cell.kind] = max(most.get(cell.kind, 0.0), within[site])
    shown = {
        site: _Shown(_percent(value), value / (most[kinds[site].kind] or 1.0), site in own)
        for site, value in within.items()
    }
    count = f"{len(own)} of {len(within)} layers have tensors of their own"
    lines = ["Percent of the sum of |s B A x|\N{SUPERSCRIPT TWO} over a module kind: every row adds up to 100."]
    return _Heatmap(shown).svg(title, lines, count, marks=("a LoRA of its own", "shares one with others of its kind"))


def _percent(share: float) -> str:
    """At most four characters: 0.3, 12, 100."""
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


class _Heatmap:
    """The picture in the making.

    Args:
        shown: site -> what its cell shows.
    """

    def __init__(self, shown: Mapping[str, _Shown]) -> None:
        self.canvas = Canvas()
        self.at = {cell: shown[site] for site, cell in cells(shown).items()}
        self.kinds = list(dict.fromkeys(cell.kind for cell in self.at))
        self.layers = sorted({cell.layer for cell in self.at if cell.layer})
        self.once = any(not cell.layer for cell in self.at)  # sites that there are once
        self.start = _LEFT + 6.6 * max((len(kind) for kind in self.kinds), default=0) + 14

    def svg(self, title: str, lines: list[str], aloud: str, marks: tuple[str, str] | None = None) -> str:
        """The element.

        Args:
            title: stands above.
            lines: stand below.
            aloud: the picture in words, for those who do not see it.
            marks: what a marked cell means, and one that is not.
        """
        draw = self.canvas
        draw.text(_LEFT, 28, title, "name left")
        y = 46.0
        bands = self._bands()
        for i, band in enumerate(bands):
            y = self._band(y, band, once=self.once and i == len(bands) - 1) + _GAP
        if marks is not None:
            x = _LEFT
            for marked, meaning in zip((True, False), marks, strict=True):
                self._cell(x, y - 6, _Shown("", 0.3, marked))
                draw.text(x + _WIDE + 8, y + 10, meaning, "soft left")
                x += _WIDE + 30 + 6.0 * len(meaning)
            y += 38
        for line in lines:
            draw.text(_LEFT, y + 4, line, "soft left")
            y += 18
        columns = max((len(band) for band in bands), default=0) + self.once
        width = max(self.start + _WIDE * columns + _LEFT, *(_LEFT * 2 + 6.0 * len(line) for line in lines), 470.0)
        return draw.svg(width, y + 4, title, f"{title}: {aloud}")

    def _bands(self) -> list[list[tuple[int, ...]]]:
        """The layers, in as few bands as there must be, all of about one width."""
        count = max(-(-len(self.layers) // MOST_COLUMNS), 1)
        size = -(-len(self.layers) // count)
        return [self.layers[i * size : (i + 1) * size] for i in range(count)]

    def _band(self, y: float, band: list[tuple[int, ...]], once: bool) -> float:
        """A stretch of layers; where it ends."""
        draw = self.canvas
        columns = [*band, ()] if once else band
        for i, layer in enumerate(columns):
            text = ".".join(map(str, layer)) if layer else "\N{EN DASH}"
            draw.text(self.start + _WIDE * (i + 0.5), y + 14, text, "soft")
        draw.text(_LEFT, y + 14, "layer", "soft left")
        y += 20
        for kind in self.kinds:
            row = [self.at.get(Cell(kind, layer)) for layer in columns]
            if not any(row):  # it stands in another band
                continue
            draw.text(_LEFT, y + 16, kind, "left")
            for i, cell in enumerate(row):
                if cell is not None:
                    self._cell(self.start + _WIDE * i, y, cell)
            y += _HIGH
        return y

    def _cell(self, x: float, y: float, cell: _Shown) -> None:
        """A marked cell has a thick frame and a corner."""
        frame = "stroke:var(--ink);stroke-width:2" if cell.marked else "stroke:var(--line);stroke-opacity:.4"
        shade = f"fill:{_FILL};fill-opacity:{_STRONGEST * cell.shade:.3g}"
        size = f'width="{_WIDE - 4:g}" height="{_HIGH - 4:g}"'
        self.canvas.parts.append(f'<rect x="{x + 2:g}" y="{y + 2:g}" {size} rx="2" style="{shade};{frame}"/>')
        if cell.marked:
            right = x + _WIDE - 2
            points = f"{right - 7:g},{y + 2:g} {right:g},{y + 2:g} {right:g},{y + 9:g}"
            self.canvas.parts.append(f'<polygon points="{points}" style="fill:var(--ink)"/>')
        self.canvas.text(x + _WIDE / 2, y + 16, cell.text)
