"""The picture of a method for its page, drawn from its components: what is frozen, what trains, and how both meet.

One factor narrows to the rank, the other one widens again. Nothing here knows a method by name: shapes and roles are
asked of the components. Every tensor is as high as the space that it comes from or leads to.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path

from lorary.analysis.svg import INK, PALETTE, style, to_svg
from lorary.cli.method_page import EXAMPLE as EXAMPLE
from lorary.cli.method_page import example_site
from lorary.model.targets import matches
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "trains": ("trains", {"facecolor": (PALETTE[1], 0.55), "edgecolor": PALETTE[1], "linewidth": 1.4}),
    "frozen": ("frozen", {"facecolor": (PALETTE[0], 0.25), "edgecolor": PALETTE[0]}),
    "shared": (
        "frozen, one for all layers",
        {"facecolor": (PALETTE[3], 0.3), "edgecolor": PALETTE[3], "linestyle": ":", "linewidth": 1.4},
    ),
    "base": ("the base, frozen", {"facecolor": (INK, 0.12), "edgecolor": (INK, 0.6)}),
    "moved": (
        "the base, frozen, after giving up s B0 A0",
        {"facecolor": (INK, 0.12), "edgecolor": PALETTE[0], "linestyle": "--", "linewidth": 1.6},
    ),
}
_LINE = (INK, 0.6)


@dataclass(frozen=True)
class Piece:
    """One tensor on the way of the update from x to y.

    Args:
        role: its name.
        shape: its shape, as it is kept.
        left, right: the sizes of the spaces that it leads from and to; equal for a vector, which scales one.
        state: `trains`, `frozen` or `shared`.
        blocks: how many small matrices side by side it stands for, each from its slice to its slice.
        copies: how many whole ones it stands for, whose outputs add up.
        note: what else there is to say about it.
    """

    role: str
    shape: tuple[int, ...]
    left: int
    right: int
    state: str
    blocks: int = 1
    copies: int = 1
    note: str = ""

    @property
    def width(self) -> int:
        return 84 if len(self.shape) == 2 else 14


def lanes(placed: AdaptedSite) -> list[list[Piece]]:
    """The tensors that make the two factors, in the order in which the input meets them.

    Those that are given have a lane of their own beneath the others.
    """
    delta, shapes = placed.delta, placed.delta.shapes(placed.site)
    if delta.chains:
        chains = [[role for role in product if role in shapes] for product in delta.chains]
        return [[_matrix(placed, role, shapes[role]) for role in chain] for chain in chains]
    factors = set(shapes) - delta.join_roles
    return [_lane(placed, roles) for roles in (factors - delta.fixed_roles, factors & delta.fixed_roles) if roles]


def _matrix(placed: AdaptedSite, role: str, shape: tuple[int, ...]) -> Piece:
    """A factor of a product of its own."""
    return Piece(role, shape, shape[1], shape[0], state(placed, role))


def _lane(placed: AdaptedSite, roles: set[str]) -> list[Piece]:
    """The lane of these roles alone: what the factors are while all others are zero."""
    delta, site = placed.delta, placed.site
    shapes = {role: shape for role, shape in delta.shapes(site).items() if role in roles}
    alone = {
        role: torch.full(shape, float(role in roles | delta.join_roles)) for role, shape in delta.shapes(site).items()
    }
    A = delta.factors(site, alone)[1]
    A = A[(A != 0).any(1)]
    width = A.shape[0]
    blocks = len(torch.unique(A != 0, dim=0))
    if not any(len(shape) == 2 and shape[0] == width and shape[1] * blocks == A.shape[1] for shape in shapes.values()):
        blocks = 1  # no tensor of its own consists of them
    copies = 1 if blocks > 1 else max(width // delta.r, 1)
    inner = width // copies
    found = []
    for role, shape in shapes.items():
        if len(shape) == 1:
            left = right = site.out_features if shape[0] % site.out_features == 0 else inner
        else:
            left = site.in_features if shape[1] * blocks == site.in_features or shape[1] == site.in_features else inner
            right = site.out_features if shape[0] == site.out_features and left != site.in_features else inner
        many = blocks if len(shape) == 2 and left != right else 1
        several = copies if shape != (1,) else 1
        note = f"{several} side by side" if several > 1 else f"{many} blocks" if many > 1 else ""
        found.append(Piece(role, shape, left, right, state(placed, role), many, several, note))
    return sorted(found, key=lambda piece: _place(piece, site))


def _place(piece: Piece, site: Site) -> tuple[int, str]:
    """Down, then what acts in the middle, then up, then what acts on the outputs."""
    if piece.left == site.in_features:
        return 0, piece.role
    if piece.right != site.out_features:
        return 1, piece.role
    return (3 if len(piece.shape) == 1 else 2), piece.role


def state(placed: AdaptedSite, role: str) -> str:
    """Whether a tensor trains, is frozen, or is frozen and one for all layers."""
    if role in placed.delta.shared:
        return "shared"
    return "trains" if role in placed.method.trained else "frozen"


def method_svg(method: Method, title: str, site: Site | None = None) -> str:
    """The picture of a method at one layer, as one `<svg>` element.

    Args:
        method: the method.
        title: the picture's name; plain text.
        site: an example layer, a linear one without parts; None: the first one that the method adapts.

    Returns:
        SVG without an external reference, the same bytes for the same method.
    """
    with style():
        return _Picture(method, site or example_site(method)).svg(title)


_TOP, _LANE, _START = 96.0, 258.0, 76.0  # the base, the update, and where it begins


class _Canvas:
    """Shapes and words in pixels, from the upper left corner on."""

    def __init__(self) -> None:
        self.figure = Figure(layout="none")
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.axis("off")
        self.used: set[str] = set()
        self.low = 0.0  # down to where there is something

    def text(self, x: float, y: float, text: str, **look: Any) -> None:
        """Text centred at (x, y)."""
        self.axes.text(x, y, text, **{"ha": "center", "va": "center"} | look)

    def soft(self, x: float, y: float, text: str, **look: Any) -> None:
        self.text(x, y, text, size=8.3, alpha=0.8, **look)

    def node(self, x: float, y: float, text: str) -> None:
        self.axes.add_patch(Circle((x, y), 14, facecolor="none", edgecolor=_LINE))
        self.text(x, y, text)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line with its tip at the last point."""
        self.axes.add_patch(
            FancyArrowPatch(path=Path(points), arrowstyle="-|>", mutation_scale=9, color=_LINE, capstyle="butt")
        )

    def matrix(self, kind: str, x: float, y: float, width: float, sizes: tuple[int, int], blocks: int = 1) -> None:
        """A tensor that leads from a space of one size to one of another, in as many blocks as it consists of."""
        gap = 4 * (blocks - 1)
        a, b = (max(height(size) - gap, 3.0 * blocks) / blocks for size in sizes)
        for i in range(blocks):
            ya, yb = (y + (i - (blocks - 1) / 2) * (side + 4) for side in (a, b))
            corners = [(x, ya - a / 2), (x + width, yb - b / 2), (x + width, yb + b / 2), (x, ya + a / 2)]
            self.fill(kind, Polygon(corners))

    def fill(self, kind: str, patch: Any) -> None:
        """Adds a patch in the look of a kind of tensor."""
        self.used.add(kind)
        patch.set(gid=f"{kind}-{len(self.axes.patches)}", **_KINDS[kind][1])
        self.axes.add_patch(patch)

    def vector(self, x: float, name: str, size: int) -> None:
        """The input or the output."""
        high = height(size)
        self.axes.add_patch(Rectangle((x - 5, _TOP - high / 2), 10, high, facecolor="none", edgecolor=_LINE))
        self.label(x, _TOP + high / 2, name, [size])

    def label(self, x: float, y: float, name: str, shape: Sequence[int], notes: Sequence[str] = ()) -> None:
        """A tensor's name and shape under it."""
        self.text(x, y + 14, name, weight="bold")
        for i, line in enumerate([str(list(shape)), *notes]):
            self.soft(x, y + 29 + 13 * i, line)
        self.low = max(self.low, y + 34 + 13 * len(notes))

    def chip(self, kind: str, x: float, y: float, name: str, shape: Sequence[int]) -> None:
        """A tensor as its name and shape alone."""
        text = f"{name} {list(shape)}"
        width = 7.2 * len(text) + 10
        self.low = max(self.low, y + 12)
        self.fill(kind, FancyBboxPatch((x - width / 2, y - 12), width, 24, boxstyle="round,pad=0,rounding_size=4"))
        self.text(x, y, text, size=9)

    def svg(self, width: float, height: float, title: str, description: str) -> str:
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.figure.set_size_inches(width / 96, height / 96)
        return to_svg(self.figure, title, description)


class _Picture(_Canvas):
    """Pieces from left to right, the base above the update."""

    def __init__(self, method: Method, site: Site) -> None:
        super().__init__()
        self.method, self.site = method, site
        self.placed = AdaptedSite(site, method) if method.delta is not None else None
        self.alone = self.placed is not None and not self.placed.join.adds_delta  # a join without an update
        # HiRA has factors, and its join takes all of them
        self.updates = self.placed is not None and not self.alone and bool(lanes(self.placed))

    def svg(self, title: str) -> str:
        end = self._update(self.placed) if self.placed and self.updates else _START + 250.0
        moved = self.method.init is not None and self.method.init.residual_init
        self.vector(34, "x", self.site.in_features)
        middle = (_START + end) / 2
        self.arrow((42, _TOP), (middle - 76, _TOP))
        self.matrix(
            "moved" if moved else self._base("weight"),
            middle - 75,
            _TOP,
            150,
            (self.site.in_features, self.site.out_features),
        )
        self.text(middle, _TOP - 7, "W \N{MINUS SIGN} s B0 A0" if moved else "W", weight="bold")
        self.soft(middle, _TOP + 9, str([self.site.out_features, self.site.in_features]))
        end = self._ending(end, middle + 75) + 55
        if self.method.context is not None and self.method.context.attention_groups:
            end = self._groups(end + 20, self.method.context.attention_groups)
        if self.method.context is not None and self.method.context.taken:
            end = self._before(end + 20, self.method.context.taken)
        return super().svg(end, self._components(end), title, self._description(title))

    def _update(self, placed: AdaptedSite) -> float:
        """The lanes of the update, and where they meet; where it ends."""
        y = _LANE
        ends: list[tuple[float, float]] = []
        for lane in lanes(placed):
            if ends:
                y = self.low + height(max(piece.right for piece in lane)) / 2 + 14
            ends.append((self._lane(lane, y), y))
        x = max(x for x, _ in ends)
        if len(ends) > 1:
            for end, y in ends:
                below = [(x + 50, y), (x + 50, _LANE + 15)]
                self.arrow((end + 2, y), *([(x + 35, y)] if y == _LANE else below))
            self.node(x + 50, _LANE, placed.delta.chains_meet)
            x += 64
        self.arrow((x + 2, _LANE), (x + 37, _LANE))
        self.node(x + 52, _LANE, "\N{MULTIPLICATION SIGN}s")
        self.soft(x + 52, _LANE + 26, f"s = {placed.scale:g}")
        if self.method.dropout:
            self.soft(_START - 18, _LANE + 14, f"dropout {self.method.dropout:g}")
        return x + 98

    def _lane(self, lane: list[Piece], y: float) -> float:
        """One lane from the input on, at this height; where its last piece ends."""
        x = _START
        self.arrow((x - 18, _TOP), (x - 18, y), (x + 21, y))
        x += 22
        if lane[0].left != self.site.in_features:  # no tensor leads from the input: MiSS sums it
            self.node(x + 13, y, "\N{GREEK CAPITAL LETTER SIGMA}")
            self.arrow((x + 28, y), (x + 61, y))
            x += 62
        for i, piece in enumerate(lane):
            if i:
                self.arrow((x + 2, y), (x + 35, y))
                x += 36
            for copy in reversed(range(piece.copies)):
                place = (x + 5 * copy, y - 5 * copy, piece.width)
                self.matrix(piece.state, *place, (piece.left, piece.right), piece.blocks)
            rate = self.method.rate(piece.role)
            notes = [piece.note] * bool(piece.note) + [f"learns {rate:g} times faster"] * (rate != 1)
            foot = y + height(max(piece.left, piece.right)) / 2
            self.label(x + piece.width / 2, foot, piece.role, piece.shape, notes)
            x += piece.width + 5 * (piece.copies - 1)
        return x

    def _ending(self, end: float, start: float) -> float:
        """From where base and update meet to y; where that is."""
        x = start
        if self.updates:
            x = end + 14
            self.arrow((start + 2, _TOP), (end - 15, _TOP))
            self.arrow((end - 30, _LANE), (end, _LANE), (end, _TOP + 15))
            self.node(end, _TOP, "+")
        if self.placed and not self.alone:
            x = self._join(x, self.placed)
        if self.site.bias:
            self.arrow((x + 2, _TOP), (x + 29, _TOP))
            self.node(x + 44, _TOP, "+")
            self.chip(self._base("bias"), x + 44, _TOP + 62, "b", [self.site.out_features])
            self.arrow((x + 44, _TOP + 50), (x + 44, _TOP + 15))
            x += 58
        if self.placed and self.alone:
            x = self._join(x, self.placed)
        self.arrow((x + 2, _TOP), (x + 36, _TOP))
        self.vector(x + 42, "y", self.site.out_features)
        return x + 47

    def _join(self, x: float, placed: AdaptedSite) -> float:
        """A join that has tensors of its own, or reads some beside the factors; where it ends."""
        join = placed.method.join
        read = placed.delta.join_roles | (join.roles if join is not None else frozenset())
        if not read:
            return x
        name = type(join).__name__
        width = 8.2 * len(name) + 22
        self.arrow((x + 2, _TOP), (x + 27, _TOP))
        box = FancyBboxPatch((x + 28, _TOP - 17), width, 34, boxstyle="round,pad=0,rounding_size=6")
        box.set(facecolor="none", edgecolor=_LINE)
        self.axes.add_patch(box)
        middle = x + 28 + width / 2
        self.text(middle, _TOP, name)
        below = _TOP + (92 if self.alone and self.site.bias else 62)  # of the bias beside it
        for i, role in enumerate(role for role in placed.shapes if role in read):
            self.chip(state(placed, role), middle, below + 30 * i, role, placed.shapes[role])
        self.arrow((middle, below - 12), (middle, _TOP + 18))
        return x + 28 + width

    def _groups(self, x: float, groups: int) -> float:
        """Which earlier tokens (across) a token (down) attends to while training, for both halves of the heads."""
        side, top = 120.0, 56.0
        self.text(x + side + 15, top - 28, f"attention while training, {groups} groups", weight="bold")
        for shift, name in ((0.0, "half of the heads"), (0.5, "the other half, shifted")):
            corners = [(x, top), (x + side, top + side), (x, top + side)]
            self.axes.add_patch(Polygon(corners, facecolor=(INK, 0.08), edgecolor="none"))
            edges = sorted({0.0, *(i + shift for i in range(groups)), float(groups)})
            for a, b in pairwise(edge * side / groups for edge in edges):
                triangle = [(x + a, top + a), (x + b, top + b), (x + a, top + b)]
                self.axes.add_patch(Polygon(triangle, facecolor=(PALETTE[2], 0.55), edgecolor=PALETTE[2]))
            self.axes.add_patch(Rectangle((x, top), side, side, facecolor="none", edgecolor=_LINE))
            self.soft(x + side / 2, top + side + 14, name)
            x += side + 30
        self.soft(x - side - 45, top + side + 32, "grey: after training, every earlier token")
        return x

    def _before(self, x: float, tokens: int) -> float:
        """What a token (down) attends to (across): what stands before the text, and earlier tokens."""
        wide, side, top = 34.0, 120.0, 56.0
        self.text(x + (wide + side) / 2, top - 28, "attention", weight="bold")
        self.fill("trains", Rectangle((x, top), wide, side))
        x += wide
        corners = [(x, top), (x + side, top + side), (x, top + side)]
        self.axes.add_patch(Polygon(corners, facecolor=(PALETTE[2], 0.55), edgecolor=PALETTE[2]))
        self.axes.add_patch(Rectangle((x, top), side, side, facecolor="none", edgecolor=_LINE))
        self.soft(x - wide / 2, top + side + 14, f"{tokens} before")
        self.soft(x + side / 2, top + side + 14, "the text")
        return x + side

    def _base(self, parameter: str) -> str:
        trains = any(matches(pattern, f"{self.site.name}.{parameter}") for pattern in self.method.full)
        return "trains" if trains else "base"

    def _components(self, end: float) -> float:
        """The first sentence of every component, and the key to the colours; where the picture ends."""
        method, y = self.method, self.low + 30
        axes = [
            ("start", None if self.alone else method.init),
            ("join", method.join),
            *(("rule", rule) for rule in method.rules),
        ]
        said = [(axis, inspect.getdoc(type(value)) or "") for axis, value in axes if value is not None]
        if method.context is not None:
            said.append(("context", inspect.getdoc(type(method.context)) or ""))
        if method.full and self.placed:
            said.append(("full", f"{' and '.join(method.full)} train too"))
        for axis, text in said:
            sentence = re.split(r"\.(?:\s|$)", text)[0].replace("`", "")
            self.soft(24, y, axis, ha="left", va="baseline")
            for line in textwrap.wrap(sentence, int((end - 80) / 6.8)):
                self.text(72, y, line, ha="left", va="baseline")
                y += 18
        x, y = 24.0, y + 10
        for kind in [kind for kind in _KINDS if kind in self.used]:
            meaning = _KINDS[kind][0]
            self.fill(kind, Rectangle((x, y - 10), 16, 12))
            self.soft(x + 23, y, meaning, ha="left", va="baseline")
            x += 42 + 6.2 * len(meaning)
        return y + 18

    def _description(self, title: str) -> str:
        if self.placed is None:
            return f"base parameters {', '.join(self.method.full)} train"
        found = [f"{role} {list(shape)} {state(self.placed, role)}" for role, shape in self.placed.shapes.items()]
        return f"beside a weight {[self.site.out_features, self.site.in_features]}: {', '.join(found)}"


def height(size: int) -> float:
    """How high a space of this size is drawn: larger is higher, and a rank beside a width can still be seen."""
    return max(5.2 * float(size**0.4), 8.0)
