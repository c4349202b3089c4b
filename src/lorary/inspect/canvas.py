"""Lines, words and shapes as SVG: what a picture is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_STYLE = """
.lorary-drawing{--page:#fff;--ink:#1f2328;--soft:#59636e;--line:#7d8590;font:13px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.lorary-drawing{--page:#15181c;--ink:#e6e6e6;--soft:#a5adb5;--line:#8b949e}}
.lorary-drawing text{fill:var(--ink);text-anchor:middle}
.lorary-drawing .soft{fill:var(--soft);font-size:11px}
.lorary-drawing .left{text-anchor:start}
.lorary-drawing .name{font-weight:600;font-size:14px}
.lorary-drawing .page{fill:var(--page)}
.lorary-drawing .line{fill:none;stroke:var(--line);stroke-width:1.4}
.lorary-drawing .node{fill:var(--page);stroke:var(--line);stroke-width:1.4}
.lorary-drawing .tip{fill:var(--line)}
.lorary-drawing .trains{fill:#f59e0b;fill-opacity:.8;stroke:#b45309;stroke-width:1.2}
.lorary-drawing .frozen{fill:#60a5fa;fill-opacity:.35;stroke:#3b82f6;stroke-width:1.2}
.lorary-drawing .shared{fill:#a78bfa;fill-opacity:.45;stroke:#8b5cf6;stroke-width:1.2}
.lorary-drawing .base{fill:url(#lorary-hatch);stroke:var(--line);stroke-width:1.2}
.lorary-drawing .moved{fill:url(#lorary-hatch);stroke:#3b82f6;stroke-width:1.8;stroke-dasharray:6 4}
.lorary-drawing .hatch{stroke:var(--line);stroke-opacity:.55;stroke-width:1.2}
""".replace("\n", "")

_HATCH = (
    '<defs><pattern id="lorary-hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="7" class="hatch"/></pattern></defs>'
)


class Canvas:
    """An SVG element in the making. Its colours follow the reader's scheme, and it brings its own background.

    The classes `trains`, `frozen`, `shared`, `base` and `moved` are fills; `node`, `line`, `page`, `soft`, `left` and
    `name` are ways to draw. Every tensor is as high as the space that it comes from or leads to.
    """

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.used: list[str] = []  # the fills
        self.low = 0.0  # down to where there is something

    def node(self, x: float, y: float, text: str) -> None:
        self.parts.append(f'<circle class="node" cx="{x:g}" cy="{y:g}" r="14"/>')
        self.text(x, y + 4.5, text)

    def line(self, path: str, x: float, y: float, up: bool = False) -> None:
        """A line with its tip at (x, y)."""
        self.parts.append(f'<path class="line" d="{path}"/>')
        sides = [(x - 4, y + 7), (x + 4, y + 7)] if up else [(x - 7, y - 4), (x - 7, y + 4)]
        points = " ".join(f"{px:g},{py:g}" for px, py in [sides[0], (x, y), sides[1]])
        self.parts.append(f'<polygon class="tip" points="{points}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        if text:
            of = f' class="{kind}"' if kind else ""
            self.parts.append(f'<text{of} x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def rect(self, kind: str, x: float, y: float, width: float, height: float, rx: float = 0) -> None:
        corner = f' rx="{rx:g}"' if rx else ""
        size = f'width="{width:g}" height="{height:.4g}"'
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:.4g}" {size}{corner}/>')

    def matrix(self, kind: str, x: float, y: float, width: float, sizes: tuple[int, int], blocks: int = 1) -> None:
        """What leads from a space of one size to one of another, in as many blocks as it consists of."""
        self.used.append(kind)
        gap = 4 * (blocks - 1)
        a, b = (max(height(size) - gap, 3.0 * blocks) / blocks for size in sizes)
        for i in range(blocks):
            ya, yb = (y + (i - (blocks - 1) / 2) * (side + 4) for side in (a, b))
            corners = [(x, ya - a / 2), (x + width, yb - b / 2), (x + width, yb + b / 2), (x, ya + a / 2)]
            points = " ".join(f"{px:g},{py:.4g}" for px, py in corners)
            self.parts.append(f'<polygon class="{kind}" points="{points}"/>')

    def bar(self, x: float, y: float, name: str, size: int) -> None:
        """A vector that goes in or comes out."""
        high = height(size)
        self.rect("node", x - 5, y - high / 2, 10, high)
        self.label(x, y + high / 2, name, [size])

    def label(self, x: float, y: float, name: str, shape: Sequence[int], notes: Sequence[str] = ()) -> None:
        """A tensor's name and shape under it."""
        self.text(x, y + 18, name, "name")
        for i, line in enumerate([str(list(shape)), *notes]):
            self.text(x, y + 32 + 13 * i, line, "soft")
        self.low = max(self.low, y + 32 + 13 * len(notes))

    def plate(self, x: float, y: float, name: str, shape: Sequence[int]) -> None:
        """A tensor's name and shape on it."""
        width = max(8.5 * len(name), 76) + 12
        self.rect("page", x - width / 2, y - 19, width, 38, 5)
        self.text(x, y - 2, name, "name")
        self.text(x, y + 13, str(list(shape)), "soft")

    def chip(self, kind: str, x: float, y: float, name: str, shape: Sequence[int]) -> None:
        """A tensor as its name and shape alone."""
        self.used.append(kind)
        self.low = max(self.low, y + 12)
        text = f"{name} {list(shape)}"
        width = 6.8 * len(text) + 14
        self.rect(kind, x - width / 2, y - 12, width, 24, 4)
        self.text(x, y + 4.5, text)

    def svg(self, width: float, height: float, title: str, description: str) -> str:
        """The element: as wide as its place allows, up to its own width."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="lorary-drawing" role="img" width="{width:g}" '
        head += f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" aria-label="{escape(description)}">'
        top = f"<title>{escape(title)}</title><style>{_STYLE}</style>{_HATCH}"
        page = f'<rect class="page" width="{width:g}" height="{height:g}" rx="8"/>'
        return "\n".join([head, top, page, *self.parts, "</svg>"]) + "\n"


def height(size: int) -> float:
    """How high a space of this size is drawn: larger is higher, and a rank beside a width can still be seen."""
    return max(5.2 * float(size**0.4), 8.0)
