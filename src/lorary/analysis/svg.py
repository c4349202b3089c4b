"""Matplotlib figures as SVG text, in one style, and the same bytes for the same figure.

Pictures follow the reader's colour scheme, light or dark, and bring their own background. Text stays text. Nothing is
marked by colour alone: lines differ in dashes and markers too, and shaded cells show their number.
"""

from __future__ import annotations

import io
import warnings
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK = "#123456"  # drawn, then replaced by `currentColor`
# The colour-blind-safe palette of Okabe & Ito; light blue and yellow darkened to a contrast of 3:1 against white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#c76aa0", "#8a7500", "#3a8fc4")
_DASHES, _MARKERS = ("-", "--", "-.", ":"), "os^DvP"
_STRONGEST = 0.55  # opacity of a cell: its number keeps its contrast on light and dark pages

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "lorary",  # deterministic element ids
    "svg.fonttype": "none",  # text stays text: selectable, searchable, read aloud
    "text.parse_math": False,  # a `$` in a name does not start a formula
    "text.color": INK,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # wider than the fonts that a browser may use instead
    "font.size": 10,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.07,  # inches, between panels one above the other
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "hatch.color": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "xtick.color": INK,
    "ytick.color": INK,
}

_COLOURS = (
    ".lorary-picture{color-scheme:light dark;color:#1f2328;background:#fff}"
    "@media (prefers-color-scheme:dark){.lorary-picture{color:#e6e6e6;background:#15181c}}"
    "@media print{.lorary-picture{color:#000;background:#fff}}"
)
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


def style() -> Any:
    """The context manager in which figures are made and converted to SVG; it restores Matplotlib's settings."""
    return rc_context(_STYLE)


def line(i: int, marker: bool = True) -> dict[str, Any]:
    """Colour, dashes and marker of the i-th line of a plot.

    Colours and markers repeat in different pairs, so that points without a line can be told apart too.
    """
    found: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "linestyle": _DASHES[i % len(_DASHES)]}
    return found | {"marker": _MARKERS[(i + i // len(PALETTE)) % len(_MARKERS)], "markersize": 5} if marker else found


def cell(
    axes: Axes, x: float, y: float, text: str, shade: float, colour: str = PALETTE[0], framed: bool = False
) -> None:
    """A cell of a heat map with its number on it.

    Args:
        axes: cells are one unit wide and high.
        x, y: the corner of the cell with the lowest coordinates.
        text: the number.
        shade: 0 to 1.
        colour: of the full shade.
        framed: whether the cell has a thick frame.
    """
    inset = 0.08 if framed else 0.0  # separates the frames of neighbours
    corner, size = (x + inset, y + inset), 1 - 2 * inset
    patch = Rectangle(corner, size, size, facecolor=(colour, _STRONGEST * shade), clip_on=False)
    patch.set(edgecolor=INK if framed else (INK, 0.3), linewidth=1.8 if framed else 0.6)
    axes.add_patch(patch)
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=8)


def cell_axes(axes: Axes, columns: float, rows: float) -> None:
    """Turn axes into a grid of cells, the first row on top, without lines."""
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def to_svg(figure: Figure, title: str, description: str) -> str:
    """The figure as one `<svg>` element, for a file or the inside of a page.

    Args:
        figure: made in the context of `style`.
        title: plain text.
        description: the content in words, for readers who do not see it.
    """
    text = io.StringIO()
    without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # text stays text: the browser has other fonts
        FigureCanvasSVG(figure).print_svg(text, metadata=without | {"Title": title})
    root = ElementTree.fromstring(text.getvalue().replace(INK, "currentColor"))
    root.attrib |= {"class": "lorary-picture", "role": "img", "aria-label": f"{title}: {description}"}
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for sheet in root.iter(f"{{{_SVG}}}style"):  # otherwise a style would apply to the whole page
        sheet.text = _COLOURS + f".lorary-picture {sheet.text}"
    return ElementTree.tostring(root, encoding="unicode") + "\n"
