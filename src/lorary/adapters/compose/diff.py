"""diff: two adapters compared site by site: norms, cosine and principal angles of their updates, from their factors.

At each site both updates are written in common orthonormal bases of their columns and rows, in 64 bits: matrices as
small as both ranks together, which have the norms, the inner product and the singular values of the dense ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.content_hash import content_hash
from lorary.adapters.low_rank_form import factors_on_base
from lorary.adapters.tensor_checks import adapter_problems
from lorary.errors import Diagnostic, MethodError, not_a
from lorary.files.strict_json import finite
from lorary.model.ambient import mode_independent
from lorary.model.fingerprint import Fingerprint
from lorary.model.targets import abbreviated
from lorary.model.text_table import aligned, first_rows
from lorary.spec.interfaces import Factors
from lorary.spec.method import AXES, Method
from lorary.spec.placement import AdaptedSite

_SHOWN = 10  # sites in a printed table
_SIGNIFICANT = torch.finfo(torch.float32).eps  # of the largest singular value: below it is the rounding of the tensors
HEAD = ("site", "rank", "||dW_A||", "||dW_B||", "difference", "cosine", "output angles", "input angles")


@dataclass(frozen=True)
class SiteDiff:
    """The updates of two adapters at one site, without what their joins (DoRA) do to the weight itself.

    Args:
        site: its name; that of expert 3 of a fused parameter is `experts.3.down_proj`.
        ranks: of A and of B.
        a: ||dW_A|| in the Frobenius norm.
        b: ||dW_B||.
        difference: ||dW_A - dW_B||.
        cosine: <dW_A, dW_B> / (||dW_A|| ||dW_B||); NaN if one of them is zero.
        output_angles: the principal angles between the column spaces (of B) in degrees, ascending.
        input_angles: those between the row spaces (of A).
        others: role -> the relative difference of the join's own tensors, such as DoRA's m.
    """

    site: str
    ranks: tuple[int, int]
    a: float
    b: float
    difference: float
    cosine: float
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]
    others: Mapping[str, float] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """||dW_A - dW_B|| relative to the larger of the two, from 0 to 2."""
        return self.difference / (max(self.a, self.b) or 1.0)

    def row(self) -> tuple[str, ...]:
        """Its row in a table with `HEAD`."""
        rank = str(self.ranks[0]) if len(set(self.ranks)) == 1 else "{} / {}".format(*self.ranks)
        return (
            self.site,
            rank,
            f"{self.a:.4g}",
            f"{self.b:.4g}",
            f"{self.relative:.2%}",
            "" if math.isnan(self.cosine) else f"{self.cosine:+.4f}",
            _span(self.output_angles),
            _span(self.input_angles),
        )


@dataclass(frozen=True)
class AdapterDiff:
    """The differences of two adapters, A and B. Prints as a table, the sites that differ most first.

    Args:
        identical: whether method, sites and tensors are equal bit for bit.
        sites: the sites that both adapt.
        only_a, only_b: the sites that one of them adapts.
        other_shapes: the sites that both adapt, with layers of other sizes or kinds: site -> both in words.
        full: parameter that both trained in full -> the relative difference of its values.
        only_full_a, only_full_b: the parameters that one of them trained in full.
        notes: differences of method and base in words.
    """

    identical: bool
    sites: tuple[SiteDiff, ...] = field(repr=False)
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    other_shapes: Mapping[str, str] = field(default_factory=dict)
    full: Mapping[str, float] = field(default_factory=dict, repr=False)
    only_full_a: tuple[str, ...] = ()
    only_full_b: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def relative(self) -> float:
        """||dW_A - dW_B|| relative to the larger of the two, over all common sites together."""
        a, b, difference = (math.hypot(*(getattr(s, name) for s in self.sites)) for name in ("a", "b", "difference"))
        return difference / (max(a, b) or 1.0)

    @property
    def have_updates(self) -> bool:
        """Whether an update of low rank is compared at any site; (IA)³ and others have none."""
        return any(any(s.ranks) for s in self.sites)

    @property
    def worst(self) -> list[SiteDiff]:
        """The common sites, those that differ most first."""
        return sorted(self.sites, key=lambda s: -s.relative)

    def rows(self, most: int = _SHOWN) -> list[tuple[str, ...]]:
        """Rows of a table with `HEAD`: the `most` sites that differ most."""
        return first_rows([s.row() for s in self.worst], most)

    def lines(self) -> list[str]:
        """Everything beside the table, in sentences."""
        if self.identical:
            return ["identical bit for bit: method, sites and tensors", *self.notes]
        differing = sum(s.difference > 0 for s in self.sites)
        lines = [f"{differing:,} of {len(self.sites):,} common sites differ, by {self.relative:.2%} together"]
        if self.sites and not self.have_updates:
            lines = [f"{len(self.sites):,} common sites, without updates of low rank"]
        others = [s for s in self.sites if any(s.others.values())]
        if others:
            worst = max(others, key=lambda s: max(s.others.values()))
            values = ", ".join(f"{role} by {value:.2%}" for role, value in worst.others.items())
            lines.append(f"{len(others):,} sites differ in other tensors, most {worst.site}: {values}")
        changed = {name: value for name, value in self.full.items() if value}
        if changed:
            worst_name = max(changed, key=lambda name: changed[name])
            what = f"{len(changed):,} of {len(self.full):,} parameters trained in full differ, most {worst_name}"
            lines.append(f"{what}, by {changed[worst_name]:.2%}")
        lines += [f"{name} has other sizes: {what}" for name, what in self.other_shapes.items()]
        for which, names in (("A", self.only_a), ("B", self.only_b)):
            lines += [f"only {which} adapts {abbreviated(names)}"] if names else []
        for which, names in (("A", self.only_full_a), ("B", self.only_full_b)):
            lines += [f"only {which} holds in full {abbreviated(names)}"] if names else []
        return [*lines, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """The comparison in JSON types; None for values that are not finite."""
        names = ("identical", "only_a", "only_b", "other_shapes", "full", "only_full_a", "only_full_b", "notes")
        whole = {name: getattr(self, name) for name in names} | {"relative": self.relative}
        return whole | {"sites": [finite(vars(s) | {"relative": s.relative}) for s in self.worst]}

    def __str__(self) -> str:
        table = [] if self.identical or not self.have_updates else aligned([HEAD, *self.rows()])
        return "\n".join([*self.lines(), *table])


@mode_independent
def diff(a: Adapter, b: Adapter) -> AdapterDiff:
    """The differences of two adapters of any methods and ranks, from their factors alone.

    The updates are those of the unmodified base, so that the start of PiSSA and OLoRA is subtracted. What a join does
    with the base's weight (DoRA's norm) needs the base; here its own tensors are compared.

    Args:
        a: the first adapter.
        b: the second adapter.

    Returns:
        The comparison, site by site.

    Raises:
        MethodError: one of them is not an adapter, or its tensors are incomplete or not finite; every reason.

    Example:
        >>> found = lorary.diff(lorary.load_adapter("first"), lorary.load_adapter("second"))
        >>> print(found)
        >>> found.worst[0].cosine
    """
    problems = not_a(Adapter, "an Adapter", a=a, b=b)
    if not problems:
        found = {which: adapter_problems(x) for which, x in (("A", a), ("B", b))}
        problems = [Diagnostic(f"{which}: {p.where}", p.what, p.fix) for which, wrong in found.items() for p in wrong]
    if problems:
        raise MethodError("cannot compare these adapters:", problems)
    here, there = ({s.site.name: s for s in adapter.sites} for adapter in (a, b))
    common = [name for name in here if name in there]
    alike = [name for name in common if here[name].site.matrix == there[name].site.matrix]
    other = {n: f"{here[n].site.matrix} in A, {there[n].site.matrix} in B" for n in common if n not in alike}
    return AdapterDiff(
        identical=content_hash(a) == content_hash(b),
        sites=tuple(found for n in alike for found in _site_diffs(here[n], a.tensors[n], there[n], b.tensors[n])),
        only_a=tuple(n for n in here if n not in there),
        only_b=tuple(n for n in there if n not in here),
        other_shapes=other,
        full={n: _relative(a.full[n], b.full[n]) for n in a.full if n in b.full},
        only_full_a=tuple(n for n in a.full if n not in b.full),
        only_full_b=tuple(n for n in b.full if n not in a.full),
        notes=(*_methods(a.method, b.method), *_bases(a.base, b.base)),
    )


def _site_diffs(
    a: AdaptedSite, tensors_a: Mapping[str, Tensor], b: AdaptedSite, tensors_b: Mapping[str, Tensor]
) -> list[SiteDiff]:
    """The comparison at one site: matrix by matrix where experts have adapters of their own, in A or in B."""
    mine, its = a.matrices(tensors_a), b.matrices(tensors_b)
    n = max(len(mine), len(its))
    names = [s.site.name for s, _ in max(mine, its, key=len)]
    mine, its = (pairs * n if len(pairs) < n else pairs for pairs in (mine, its))
    return [_site_diff(name, *x, *y) for name, x, y in zip(names, mine, its, strict=True)]


def _site_diff(
    name: str, a: AdaptedSite, tensors_a: Mapping[str, Tensor], b: AdaptedSite, tensors_b: Mapping[str, Tensor]
) -> SiteDiff:
    Ca, Cb = _cores(factors_on_base(a, tensors_a), factors_on_base(b, tensors_b))
    norm_a, norm_b, difference = (float(C.norm()) for C in (Ca, Cb, Ca - Cb))
    (Ua, Va), (Ub, Vb) = _spaces(Ca), _spaces(Cb)
    roles = a.join.roles & b.join.roles & tensors_a.keys() & tensors_b.keys()
    return SiteDiff(
        name,
        (a.r, b.r),
        norm_a,
        norm_b,
        difference,
        float((Ca * Cb).sum()) / (norm_a * norm_b) if norm_a and norm_b else math.nan,
        principal_angles(Ua, Ub),
        principal_angles(Va, Vb),
        {role: _relative(tensors_a[role], tensors_b[role]) for role in sorted(roles)},
    )


def _cores(a: Factors, b: Factors) -> tuple[Tensor, Tensor]:
    """Both products in common orthonormal bases of their columns and rows: [k, l] each, in 64 bits."""
    (Ba, Aa), (Bb, Ab) = a, b
    if torch.equal(Ba, Bb) and torch.equal(Aa, Ab):  # equal to the bit, not to rounding
        Bb, Ab = Ba[:, :0], Aa[:0]
    R = torch.linalg.qr(torch.cat([Ba, Bb], 1).double(), mode="r").R
    T = torch.linalg.qr(torch.cat([Aa, Ab]).double().T, mode="r").R
    n = Ba.shape[1]
    Ca = R[:, :n] @ T[:, :n].T
    return Ca, R[:, n:] @ T[:, n:].T if Bb.shape[1] else Ca


def _spaces(C: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column space and of the row space of a matrix, as columns."""
    U, S, V = torch.linalg.svd(C, full_matrices=False)
    k = int(S.gt(_SIGNIFICANT * S[:1]).sum())
    return U[:, :k], V[:k].T


def principal_angles(U: Tensor, V: Tensor) -> tuple[float, ...]:
    """The principal angles between two spaces in degrees, ascending (Björck and Golub 1973).

    Args:
        U: [n, k], orthonormal columns.
        V: [n, l], orthonormal columns.

    Returns:
        min(k, l) angles. Those below 45 degrees come from their sines, which are exact near 0.
    """
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    if not V.shape[1]:
        return ()
    cosines = torch.linalg.svdvals(U.T @ V).clamp(max=1.0)  # descending
    sines = torch.linalg.svdvals(V - U @ (U.T @ V)).flip(0).clamp(max=1.0)  # ascending
    small = cosines.square() > 0.5
    return tuple(torch.where(small, sines.asin(), cosines.acos()).rad2deg().tolist())


def _relative(x: Tensor, y: Tensor) -> float:
    """||x - y|| relative to the larger of the two; infinite for other shapes."""
    if x.shape != y.shape:
        return math.inf
    x, y = x.double(), y.double()
    return float((x - y).norm()) / (max(float(x.norm()), float(y.norm())) or 1.0)


def _methods(a: Method, b: Method) -> list[str]:
    """The axes on which two methods differ; their ranks and scales may differ at a site all the same."""
    pairs = {axis: (getattr(a, axis), getattr(b, axis)) for axis in AXES}
    return [f"method, {axis}: {_text(x)} in A, {_text(y)} in B" for axis, (x, y) in pairs.items() if x != y]


def _text(component: object) -> str:
    """A component of a method, or several, in words."""
    if isinstance(component, tuple | frozenset):
        component = ", ".join(str(one) for one in component)
    return str(component or "none")


def _bases(a: Fingerprint, b: Fingerprint) -> list[str]:
    """The differences of two bases; what one of them does not say is not compared."""
    notes = []
    for name in ("architecture", "structure", "weights", "name"):
        x, y = getattr(a, name), getattr(b, name)
        if x and y and x != y:
            notes.append(f"base, {name}: {x[:60]} in A, {y[:60]} in B")
    return notes


def _span(angles: Sequence[float]) -> str:
    if not angles:
        return ""
    ends = dict.fromkeys((f"{angles[0]:.1f}", f"{angles[-1]:.1f}"))
    return f"{' to '.join(ends)}°"
