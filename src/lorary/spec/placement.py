"""Placed: one site and the method that it takes there, with its own rank and scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from lorary.errors import Diagnostic, MethodError
from lorary.spec.interfaces import Delta, Init, Join, Scale, Shapes
from lorary.spec.method import Method, braces
from lorary.spec.site import Site


class Adaptation(NamedTuple):
    """The components of a method that adapts layers, none of them missing: what is learnt, its start, size and join."""

    delta: Delta
    init: Init
    scale: Scale
    join: Join


def adaptation(method: Method) -> Adaptation:
    """The components by which a method adapts a layer.

    Raises:
        MethodError: it trains base parameters only.
    """
    if method.delta is None or method.init is None or method.scale is None or method.join is None:
        raise MethodError("this method adapts no layer:", [Diagnostic("delta", "only base parameters train")])
    return Adaptation(method.delta, method.init, method.scale, method.join)


@dataclass(frozen=True)
class AdaptedSite:
    """One adapted site: where, and the method there. A plan lists them, an adapter holds tensors for them.

    Args:
        site: where.
        method: the method there, with the site's own rank and scale.
        share: the name of a set of tensors that all sites of that name train in common; empty for its own.
    """

    site: Site
    method: Method
    share: str = ""

    @property
    def delta(self) -> Delta:
        return adaptation(self.method).delta

    @property
    def init(self) -> Init:
        return adaptation(self.method).init

    @property
    def join(self) -> Join:
        return adaptation(self.method).join

    @property
    def r(self) -> int:
        """The rank at this site."""
        return self.delta.r

    @property
    def alpha(self) -> float | None:
        """The alpha at this site; None for a scale that has none."""
        return getattr(self.method.scale, "alpha", None)

    @property
    def scale(self) -> float:
        """The factor s at this site."""
        return adaptation(self.method).scale(self.r)

    @property
    def shapes(self) -> Shapes:
        """role -> shape of every tensor at this site."""
        return self.delta.shapes(self.site) | self.join.shapes(self.site)

    @property
    def stored(self) -> Shapes:
        """role -> shape of everything that a file holds of this site: where a moved base's delta started, too."""
        return self.shapes | {start_name(role): shape for role, shape in self.starts.items()}

    @property
    def starts(self) -> Shapes:
        """role -> shape of the tensors whose start is kept, because the base gave up s B A for it."""
        return self.delta.shapes(self.site) if self.init.residual_init else {}

    @property
    def trainable(self) -> int:
        """How many numbers train at this site."""
        return sum(math.prod(shape) for role, shape in self.shapes.items() if role in self.method.trained)

    def problems(self) -> list[Diagnostic]:
        """Why this method cannot work at this site."""
        why = self.delta.problems(self.site) + self.init.problems(self.site, self.r) + self.join.problems(self.site)
        found = [Diagnostic(self.site.name, what) for what in why]
        zeros = self.init.zeros(self.site)
        if zeros and not zeros & self.method.trained:
            where = f"{braces(zeros)} starts at zero in a layer of kind {self.site.kind}"
            what = f"{where} and is frozen: nothing could be learnt"
            found.append(Diagnostic(self.site.name, what, "exclude it, or use another init"))
        return found


def unique_tensor_sets(placed: Iterable[AdaptedSite]) -> list[AdaptedSite]:
    """One site for each set of tensors: of those that train one in common the first."""
    first: dict[tuple[str, str], AdaptedSite] = {}
    for p in placed:
        first.setdefault(("share", p.share) if p.share else ("site", p.site.name), p)
    return list(first.values())


def inconsistent_ties(placed: Iterable[AdaptedSite]) -> list[Diagnostic]:
    """The sites that are to train one set of tensors with another site, and cannot."""
    first: dict[str, AdaptedSite] = {}
    problems = []
    for p in placed:
        other = first.setdefault(p.share, p) if p.share else p
        if p.shapes != other.shapes or p.method != other.method:
            what = f"shares what it learns with {other.site.name}, which has other shapes or another method"
            problems.append(Diagnostic(p.site.name, what, "let it learn its own"))
        elif p.share and p.init.residual_init:
            what = f"shares what it learns, and {type(p.init).__name__} starts at the weight of each layer"
            problems.append(Diagnostic(p.site.name, what, "say another init"))
    return problems


def shared_shapes(placed: Iterable[AdaptedSite]) -> Shapes:
    """role -> shape of what all sites share: in every direction as large as the largest of them asks for."""
    sizes: Shapes = {}
    for p in placed:
        for role in sorted(p.delta.shared):
            shape = p.shapes[role]
            sizes[role] = tuple(map(max, shape, sizes.get(role, shape)))
    return sizes


def start_name(role: str) -> str:
    """The name of a role's start: `A0` for `A`."""
    return f"{role}0"


def with_rank(method: Method, r: int | None = None, alpha: float | None = None) -> Method:
    """The method with another rank or alpha, every other word as it is.

    Raises:
        MethodError: the rank or alpha is out of range.
        TypeError: the scale has no alpha to change.
    """
    words: dict[str, object] = {}
    if r is not None:
        words["delta"] = dataclasses.replace(cast(Any, method.delta), r=r)
    if alpha is not None:
        words["scale"] = dataclasses.replace(cast(Any, method.scale), alpha=alpha)
    return method.replace(**words) if words else method
