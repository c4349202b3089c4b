"""Adapted sites: a site with its method, which may have its own rank and scale there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor

from lorary.errors import Diagnostic, MethodError, StateError
from lorary.spec.calibration import CalibratedInit
from lorary.spec.interfaces import Delta, Factors, Init, Join, Rule, Scale, Shapes, Tensors, has_rank
from lorary.spec.join import not_mergeable
from lorary.spec.method import Method, braces
from lorary.spec.per_expert import experts_of, factors_at, for_every_expert, merged_at, shapes_at, why_not_per_expert
from lorary.spec.site import PROJECTIONS, Site


class Adaptation(NamedTuple):
    """The delta of a method with its init, scale and join, none of them None."""

    delta: Delta
    init: Init
    scale: Scale
    join: Join


def adaptation(method: Method) -> Adaptation:
    """The delta of a method, with its init, scale and join.

    Raises:
        MethodError: it trains base parameters only.
    """
    if method.delta is None or method.init is None or method.scale is None or method.join is None:
        raise MethodError("this method adapts no layer:", [Diagnostic("delta", "only base parameters train")])
    return Adaptation(method.delta, method.init, method.scale, method.join)


@dataclass(frozen=True)
class AdaptedSite:
    """A site and its method. A plan lists them, an adapter holds tensors for them.

    Args:
        site: the layer.
        method: the method, with the site's own rank and scale.
        share: the name of a set of tensors that several sites share; empty for tensors of its own.
    """

    site: Site
    method: Method
    share: str = ""

    @cached_property
    def _adaptation(self) -> Adaptation:
        return adaptation(self.method)

    @property
    def delta(self) -> Delta:
        return self._adaptation.delta

    @property
    def init(self) -> Init:
        return self._adaptation.init

    @property
    def join(self) -> Join:
        return self._adaptation.join

    @property
    def r(self) -> int:
        """The rank at this site."""
        return self.delta.r

    @property
    def alpha(self) -> float | None:
        """The alpha at this site; None if the scale has none."""
        return getattr(self.method.scale, "alpha", None)

    @property
    def scale(self) -> float:
        """The factor s at this site."""
        return self._adaptation.scale(self.r)

    @property
    def changes_bias(self) -> bool:
        """Whether the layer's bias changes at this site."""
        return self.delta.changes_bias or self.join.changes_bias

    @cached_property
    def shapes(self) -> Shapes:
        """role -> shape of every tensor at this site."""
        return shapes_at(self.delta, self.site, self.delta.shared) | shapes_at(self.join, self.site)

    @property
    def stored(self) -> Shapes:
        """role -> shape of every tensor that a file holds for this site, the start of a residual init included."""
        starts = self.starts
        return self.shapes | {start_name(role): shape for role, shape in starts.items()} if starts else self.shapes

    @property
    def starts(self) -> Shapes:
        """role -> shape of the tensors whose start is kept, because it was subtracted from the base."""
        return shapes_at(self.delta, self.site, self.delta.shared) if self.init.residual_init else {}

    @property
    def trainable(self) -> int:
        """The number of trainable numbers at this site."""
        return sum(math.prod(shape) for role, shape in self.shapes.items() if role in self.method.trained)

    def factors(self, params: Tensors) -> Factors:
        """(B [out, R], A [R, in]) of this site's tensors, without the scale; with a leading E for experts."""
        return for_every_expert(self.site, factors_at(self.delta, self.site, params))

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        """The join's (W', b') for this site's tensors; see `Join.merged`."""
        return merged_at(self.join, self.site, params, W, b, BA, self.scale)

    def matrices(self, tensors: Tensors) -> list[tuple[AdaptedSite, dict[str, Tensor]]]:
        """The site of each expert and its tensors; this site alone where it has one adapter."""
        return [
            (dataclasses.replace(self, site=site), own)
            for site, own in experts_of(self.site, tensors, self.delta.shared)
        ]

    def problems(self) -> list[Diagnostic]:
        """The reasons why this method cannot adapt this site."""
        one = self.site.one
        why = self.delta.problems(one) + self.init.problems(one, self.r) + self.join.problems(one)
        why += why_not_per_expert(self.site, self.method) + why_not_in_attention(self.site, self.method)
        found = [Diagnostic(self.site.name, what) for what in why]
        zeros = self.init.zeros(one)
        if zeros and not zeros & self.method.trained:
            where = f"{braces(zeros)} starts at zero in a layer of kind {self.site.kind}"
            what = f"{where} and is frozen: nothing could train"
            found.append(Diagnostic(self.site.name, what, "exclude it, or use another init"))
        return found


def check_mergeable(sites: Iterable[AdaptedSite]) -> None:
    """Refuse to merge an adapter whose function no plain model has.

    Raises:
        StateError: the reasons.
    """
    if problems := not_mergeable((s.site.name, s.join) for s in sites):
        raise StateError("cannot merge:", problems)


def family(method: Method) -> tuple[Any, ...]:
    """The parts of a method that do not vary between its own sites: equal for all sites of one method.

    Ranks, alphas and what training has made of a delta may differ from site to site.
    """
    kinds = type(method.delta), type(method.scale)
    return *kinds, method.init, method.join, method.frozen, method.lr, method.rules, method.dropout


def joins_of(sites: Iterable[AdaptedSite]) -> list[tuple[Site, Join]]:
    """Each site with its join."""
    return [(s.site, s.join) for s in sites]


def by_method(sites: Iterable[AdaptedSite]) -> list[list[AdaptedSite]]:
    """The sites of each method of a plan or an adapter; one group where it has one method."""
    groups: dict[tuple[Any, ...], list[AdaptedSite]] = {}
    for s in sites:
        groups.setdefault(family(s.method), []).append(s)
    return list(groups.values())


def rules_of(sites: Iterable[AdaptedSite]) -> tuple[Rule, ...]:
    """The rules of all sites, each once."""
    return tuple(dict.fromkeys(rule for s in sites for rule in s.method.rules))


def unique_tensor_sets(sites: Iterable[AdaptedSite]) -> list[AdaptedSite]:
    """The sites without those that share the tensors of an earlier one."""
    first: dict[tuple[str, str], AdaptedSite] = {}
    for s in sites:
        first.setdefault(("share", s.share) if s.share else ("site", s.site.name), s)
    return list(first.values())


def replaces_rows(adapted: AdaptedSite) -> bool:
    """Whether a site holds rows of the base's weight, in place of the base's own."""
    return adapted.join.replaces_rows


def replaced_tables(sites: Iterable[AdaptedSite]) -> set[str]:
    """The weights of which an adapter replaces rows: those of new tokens are drawn again at every load of the base."""
    return {f"{s.site.name}.weight" for s in sites if replaces_rows(s)}


def inconsistent_ties(sites: Iterable[AdaptedSite]) -> list[Diagnostic]:
    """The sites that cannot share the tensors of another site."""
    first: dict[str, AdaptedSite] = {}
    problems = []
    for s in sites:
        other = first.setdefault(s.share, s) if s.share else s
        if s.shapes != other.shapes or s.method != other.method:
            what = f"shares its tensors with {other.site.name}, which has other shapes or another method"
            problems.append(Diagnostic(s.site.name, what, "give it tensors of its own"))
        elif s.share and (s.init.residual_init or isinstance(s.init, CalibratedInit)):
            what = f"shares its tensors, and {type(s.init).__name__} starts at the {start_source(s.init)} of each layer"
            problems.append(Diagnostic(s.site.name, what, "use another init"))
    return problems


def shared_shapes(sites: Iterable[AdaptedSite]) -> Shapes:
    """role -> shape of the tensors shared by all sites: in every dimension the largest that a site needs."""
    sizes: Shapes = {}
    for s in sites:
        for role in sorted(s.delta.shared):
            shape = s.shapes[role]
            sizes[role] = tuple(map(max, shape, sizes.get(role, shape)))
    return sizes


def start_source(init: Init) -> str:
    """What of a layer its start is taken from, where layers that share tensors cannot start alike."""
    return "weight" if init.residual_init else "inputs"


def start_name(role: str) -> str:
    """The name of the kept start of a role: `A0` for `A`."""
    return f"{role}0"


def with_rank(method: Method, r: int | None = None, alpha: float | None = None) -> Method:
    """The method with another rank or alpha.

    Raises:
        MethodError: the rank or alpha is out of range, or the method has no rank.
        TypeError: the scale has no alpha to change.
    """
    components: dict[str, object] = {}
    if r is not None and not has_rank(method.delta):
        what = f"is {r}, and {type(method.join).__name__} has no rank"
        raise MethodError("invalid method:", [Diagnostic("r", what, "leave it out")])
    if r is not None:
        components["delta"] = dataclasses.replace(cast(Any, method.delta), r=r)
    if alpha is not None:
        components["scale"] = dataclasses.replace(cast(Any, method.scale), alpha=alpha)
    return method.replace(**components) if components else method


def why_not_in_attention(site: Site, method: Any) -> list[str]:
    """The reasons why a method cannot adapt a projection of nn.MultiheadAttention."""
    if site.kind not in PROJECTIONS:
        return []
    why = []
    changing = method.delta if method.delta.changes_bias else method.join
    if site.kind == "in_projection" and (changing.changes_bias or method.join.scales_bias):
        what = f"{type(changing).__name__} changes the bias of a layer"
        why.append(f"{what}, and that of an in-projection belongs to nn.MultiheadAttention (in_proj_bias)")
    if isinstance(method.init, CalibratedInit):
        why.append(f"no calibration pass measures a projection of nn.MultiheadAttention ({type(method.init).__name__})")
    return why
