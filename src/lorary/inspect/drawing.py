"""A picture of a method, drawn from its own words: what is frozen, what trains, and how both meet.

One factor narrows to the rank, the other one widens again. Nothing here knows a method by name: shapes and roles are
asked of the words.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass

import torch

from lorary.inspect.canvas import Canvas, height
from lorary.placed import Placed
from lorary.record import Method
from lorary.sites import Site
from lorary.targets import matches

EXAMPLE = Site("layer", "linear", out=2048, inp=1024, bias=True)

_MEANING = {
    "trains": "trains",
    "frozen": "frozen",
    "shared": "frozen, one for all layers",
    "base": "the base, frozen",
    "moved": "the base, frozen, after giving up s B0 A0",
}


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


def lanes(placed: Placed) -> list[list[Piece]]:
    """The tensors that make the two factors, in the order in which the input meets them.

    Those that are given have a lane of their own beneath the others.
    """
    delta = placed.delta
    factors = set(delta.shapes(placed.site)) - delta.extras
    return [_lane(placed, roles) for roles in (factors - delta.given, factors & delta.given) if roles]


def _lane(placed: Placed, roles: set[str]) -> list[Piece]:
    """The lane of these roles alone: what the factors are while all others are zero."""
    delta, site = placed.delta, placed.site
    shapes = {role: shape for role, shape in delta.shapes(site).items() if role in roles}
    alone = {role: torch.full(shape, float(role in roles | delta.extras)) for role, shape in delta.shapes(site).items()}
    A = delta.factors(site, alone)[1]
    A = A[(A != 0).any(1)]
    width = A.shape[0]
    blocks = len(torch.unique(A != 0, dim=0))
    copies = 1 if blocks > 1 else max(width // delta.r, 1)
    inner = width // copies
    found = []
    for role, shape in shapes.items():
        if len(shape) == 1:
            left = right = site.out if shape[0] % site.out == 0 else inner
        else:
            left = site.inp if shape[1] * blocks == site.inp or shape[1] == site.inp else inner
            right = site.out if shape[0] == site.out and left != site.inp else inner
        many = blocks if len(shape) == 2 and left != right else 1
        several = copies if shape != (1,) else 1
        note = f"{several} side by side" if several > 1 else f"{many} blocks" if many > 1 else ""
        found.append(Piece(role, shape, left, right, state(placed, role), many, several, note))
    return sorted(found, key=lambda piece: _place(piece, site))


def _place(piece: Piece, site: Site) -> tuple[int, str]:
    """Down, then what acts in the middle, then up, then what acts on the outputs."""
    if piece.left == site.inp:
        return 0, piece.role
    if piece.right != site.out:
        return 1, piece.role
    return (3 if len(piece.shape) == 1 else 2), piece.role


def state(placed: Placed, role: str) -> str:
    """Whether a tensor trains, is frozen, or is frozen and one for all layers."""
    if role in placed.delta.shared:
        return "shared"
    return "trains" if role in placed.method.trained else "frozen"


def method_svg(method: Method, title: str, site: Site = EXAMPLE) -> str:
    """A method at one layer, as one `<svg>` element.

    Args:
        method: the method.
        title: what the picture is called; plain text.
        site: an example layer, a linear one without parts.

    Returns:
        SVG without an external reference, the same bytes for the same method; it brings its own background, so that
        it reads on light and dark pages.

    >>> from lorary import method
    >>> svg = method_svg(method("lora", r=4), "LoRA")
    >>> svg.startswith("<svg"), "[4, 1024]" in svg
    (True, True)
    """
    return _Drawing(method, title, site).svg()


_TOP, _LANE, _START = 96, 258, 76


class _Drawing:
    """The picture in the making: pieces from left to right, the base above the update."""

    def __init__(self, method: Method, title: str, site: Site) -> None:
        self.method, self.title, self.site = method, title, site
        self.placed = Placed(site, method) if method.delta is not None else None
        self.canvas = Canvas()

    def svg(self) -> str:
        end = self._update(self.placed) if self.placed else _START + 250.0
        base = "moved" if self.method.init is not None and self.method.init.moves_base else self._base("weight")
        draw = self.canvas
        draw.bar(34, _TOP, "x", self.site.inp)
        middle = (_START + end) / 2
        left, right = middle - 75, middle + 75
        draw.line(f"M42 {_TOP}H{left - 2:g}", left, _TOP)
        draw.matrix(base, left, _TOP, 150, (self.site.inp, self.site.out))
        name = "W \N{MINUS SIGN} s B0 A0" if base == "moved" else "W"
        draw.plate(middle, _TOP, name, [self.site.out, self.site.inp])
        end = self._ending(end, right)
        return draw.svg(end + 60, self._words(end), self.title, self._aloud())

    def _update(self, placed: Placed) -> float:
        """The lanes of the update, and where they meet; where it ends."""
        draw, y = self.canvas, float(_LANE)
        ends: list[tuple[float, float]] = []
        for lane in lanes(placed):
            if ends:
                y = draw.low + height(max(piece.right for piece in lane)) / 2 + 14
            ends.append((self._lane(lane, y), y))
        x = max(x for x, _ in ends)
        if len(ends) > 1:
            for end, y in ends:
                up = "" if y == _LANE else f"V{_LANE + 16}"
                draw.line(
                    f"M{end + 2:g} {y:g}H{x + 50 if up else x + 34:g}{up}",
                    x + (50 if up else 36),
                    _LANE + 14 if up else _LANE,
                    bool(up),
                )
            draw.node(x + 50, _LANE, "+")
            x += 64
        draw.line(f"M{x + 2:g} {_LANE}H{x + 34:g}", x + 36, _LANE)
        x += 36
        draw.node(x + 16, _LANE, "\N{MULTIPLICATION SIGN}s")
        draw.text(x + 16, _LANE + 32, f"s = {placed.scale:g}", "soft")
        if self.method.dropout:
            draw.text(_START - 18, _LANE + 18, f"dropout {self.method.dropout:g}", "soft")
        return x + 62

    def _lane(self, lane: list[Piece], y: float) -> float:
        """One lane from the input on, at this height; where its last piece ends."""
        x: float = _START
        draw = self.canvas
        draw.line(f"M{x - 18} {_TOP}V{y:g}H{x + 20}", x + 22, y)
        x += 22
        for i, piece in enumerate(lane):
            if i:
                draw.line(f"M{x + 2:g} {y:g}H{x + 34:g}", x + 36, y)
                x += 36
            for copy in reversed(range(piece.copies)):
                for kind in ("page", piece.state):  # the page under it, so that cards behind it do not shine through
                    corner, sizes = (x + 5 * copy, y - 5 * copy), (piece.left, piece.right)
                    draw.matrix(kind, *corner, piece.width, sizes, piece.blocks)
            rate = self.method.rate(piece.role)
            notes = [piece.note] * bool(piece.note) + [f"learns {rate:g} times faster"] * (rate != 1)
            foot = y + height(max(piece.left, piece.right)) / 2
            draw.label(x + piece.width / 2, foot, piece.role, piece.shape, notes)
            x += piece.width + 5 * (piece.copies - 1)
        return x

    def _ending(self, end: float, start: float) -> float:
        """From where base and update meet to y; where that is."""
        x, draw = end, self.canvas
        if self.placed:
            draw.line(f"M{start + 2} {_TOP}H{x - 16:g}", x - 14, _TOP)
            draw.line(f"M{x - 30:g} {_LANE}H{x:g}V{_TOP + 16}", x, _TOP + 14, up=True)
            draw.node(x, _TOP, "+")
            x += 14
            x = self._join(x, self.placed)
        else:
            x = start
        draw.line(f"M{x + 2:g} {_TOP}H{x + 28:g}", x + 30, _TOP)
        draw.node(x + 44, _TOP, "+")
        draw.chip(self._base("bias"), x + 44, _TOP + 62, "b", [self.site.out])
        draw.line(f"M{x + 44:g} {_TOP + 50}V{_TOP + 18}", x + 44, _TOP + 16, up=True)
        x += 58
        draw.line(f"M{x + 2:g} {_TOP}H{x + 36:g}", x + 38, _TOP)
        draw.bar(x + 42, _TOP, "y", self.site.out)
        return x + 50

    def _join(self, x: float, placed: Placed) -> float:
        """A join that has tensors of its own, or reads some beside the factors; where it ends."""
        join = placed.method.join
        read = placed.delta.extras | (join.roles if join is not None else frozenset())
        if not read:
            return x
        draw, name = self.canvas, type(join).__name__
        width = 8.2 * len(name) + 22
        draw.line(f"M{x + 2:g} {_TOP}H{x + 26:g}", x + 28, _TOP)
        draw.rect("node", x + 28, _TOP - 17, width, 34, 6)
        middle = x + 28 + width / 2
        draw.text(middle, _TOP + 5, name)
        for i, role in enumerate(role for role in placed.shapes if role in read):
            draw.chip(state(placed, role), middle, _TOP + 62 + 30 * i, role, placed.shapes[role])
        draw.line(f"M{middle:g} {_TOP + 50}V{_TOP + 21}", middle, _TOP + 19, up=True)
        return x + 28 + width

    def _base(self, parameter: str) -> str:
        trains = any(matches(pattern, f"{self.site.name}.{parameter}") for pattern in self.method.full)
        return "trains" if trains else "base"

    def _words(self, end: float) -> float:
        """What the words say about themselves, and what the colours mean; where the picture ends."""
        draw = self.canvas
        y = draw.low + 30
        speaking: list[tuple[str, object]] = [("start", self.method.init), ("join", self.method.join)]
        for axis, value in speaking + [("rule", rule) for rule in self.method.rules]:
            said = (inspect.getdoc(type(value)) or "") if value is not None else ""
            sentence = re.split(r"\.(?:\s|$)", said)[0].replace("`", "")
            for i, line in enumerate(textwrap.wrap(sentence, int((end - 20) / 6.8))):
                draw.text(24, y, axis if i == 0 else "", "soft left")
                draw.text(60, y, line, "left")
                y += 18
        y += 10
        x = 24.0
        for kind in [kind for kind in _MEANING if kind in draw.used]:
            draw.rect(kind, x, y - 10, 16, 12)
            draw.text(x + 23, y, _MEANING[kind], "soft left")
            x += 42 + 5.9 * len(_MEANING[kind])
        return y + 18

    def _aloud(self) -> str:
        """The picture in words, for those who do not see it."""
        if self.placed is None:
            return f"{self.title}: base parameters {', '.join(self.method.full)} train"
        found = [f"{role} {list(shape)} {state(self.placed, role)}" for role, shape in self.placed.shapes.items()]
        return f"{self.title} beside a weight {[self.site.out, self.site.inp]}: {', '.join(found)}"
