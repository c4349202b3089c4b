"""change_rank: a trained adapter at another rank: padded with new directions, or truncated to its best approximation.

Up, the function stays what it was: the new rows of A are drawn as for a new adapter, the new columns of B are zero, and
can train. Down, each product is truncated to its largest singular values (Eckart and Young 1936), which is the best
approximation of that rank. The scale s stays as it is: alpha changes with the rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.truncate import MOST_RANK, product_svd
from lorary.errors import Diagnostic, MethodError, not_a
from lorary.methods.lora import Kaiming
from lorary.model.ambient import mode_independent
from lorary.model.rank_pruning import directions_of
from lorary.spec.interfaces import Factors, has_rank
from lorary.spec.method import Method
from lorary.spec.per_expert import stack_experts
from lorary.spec.placement import AdaptedSite, start_name
from lorary.spec.resizable import Resizable, Singular

Roles = dict[str, Tensor]


@dataclass(frozen=True)
class RankChange:
    """An adapter at another rank, and the error of its update.

    Args:
        adapter: the adapter at the new rank.
        errors: site -> the relative error of its update, |dW' - dW| / |dW| in the Frobenius norm; 0 where it grew.
        error: the same of all sites together.
    """

    adapter: Adapter
    errors: Mapping[str, float] = field(repr=False)
    error: float

    def __str__(self) -> str:
        r = cast(Any, self.adapter.method.delta).r
        if not self.error:
            return f"rank {r}: the function is unchanged"
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"rank {r}: the update is off by {self.error:.2%} in the Frobenius norm, most at {worst} "
            f"({self.errors[worst]:.2%})"
        )


@mode_independent
def change_rank(adapter: Adapter, r: int, *, seed: int = 0) -> RankChange:
    """An adapter with rank r at every site.

    Args:
        adapter: of LoRA or a method whose update has a rank; a start of its own (PiSSA, OLoRA) becomes part of the
            update if the rank falls, so that the result is a plain LoRA on the unmodified base.
        r: the new rank, for methods with several pairs that of each pair.
        seed: for the rows of A that are new.

    Returns:
        The adapter and the error of its update at every site.

    Raises:
        MethodError: a method has no other rank, or not this one; every reason.

    Example:
        >>> change = lorary.change_rank(lorary.load_adapter("out/adapter"), 8)
        >>> print(change)
        >>> lorary.save_adapter(change.adapter, "smaller")
    """
    problems = not_a(Adapter, "an Adapter", adapter=adapter)
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MOST_RANK:
        problems.append(Diagnostic("r", f"is {r!r}; a rank is a whole number from 1 to {MOST_RANK:,}"))
    problems = problems or list({str(p): p for s in adapter.sites for p in _why_not(s, r)}.values())
    if not problems and not adapter.sites:
        problems.append(Diagnostic("adapter", "adapts no layers, so it has no rank"))
    if problems:
        raise MethodError("cannot change the rank of this adapter:", problems)
    sites, tensors, lost = [], {}, {}
    shared: dict[str, Roles] = {}  # sites may share one set of tensors
    for s in adapter.sites:
        resized, matrices, squares = zip(
            *(_resized(*one, r, seed) for one in s.matrices(adapter.tensors[s.site.name])), strict=True
        )
        sites.append(dataclasses.replace(resized[0], site=s.site))
        roles = stack_experts(s.site, matrices, s.delta.shared)
        lost[s.site.name] = sum(e for e, _ in squares), sum(n for _, n in squares)
        tensors[s.site.name] = shared.setdefault(s.share, roles) if s.share else roles
    method = _with_rank(adapter.method, r, plain=any(s.starts and r < directions_of(s) for s in adapter.sites))
    total = math.sqrt(sum(e for e, _ in lost.values())) / (math.sqrt(sum(n for _, n in lost.values())) or 1.0)
    errors = {name: math.sqrt(e) / (math.sqrt(n) or 1.0) for name, (e, n) in lost.items()}
    return RankChange(dataclasses.replace(adapter, method=method, sites=tuple(sites), tensors=tensors), errors, total)


def _why_not(s: AdaptedSite, r: int) -> list[Diagnostic]:
    """Why a site's method cannot have rank r, in words that are the same for all of its sites."""
    delta, name = s.delta, type(s.delta).__name__
    if not has_rank(delta):
        return [Diagnostic("join", f"{type(s.join).__name__} has no rank: its change is not a sum of directions")]
    if not isinstance(delta, Resizable):
        what = f"{name} has no other rank: its tensors are not directions that could be added or left out"
        return [Diagnostic("delta", what, "train another adapter of the rank that you want")]
    found = []
    if r < directions_of(s):
        (one, zeros), *_ = s.matrices({role: torch.zeros(shape) for role, shape in s.shapes.items()})
        if not delta.products(one.site, zeros):
            what = f"{name} is more than one product, and has no best approximation in its own form"
            found.append(Diagnostic("delta", what, "mix it into a LoRA first, or keep its rank"))
        if s.starts and not s.method.storage.writable:
            what = f"{type(s.method.storage).__name__} has quantised the base without the start of {name}"
            found.append(Diagnostic("storage", what, "keep the rank, or raise it"))
    try:
        _with_rank(s.method, r, plain=False)
    except MethodError as error:
        found += error.problems
    return found


def _with_rank(method: Method, r: int, *, plain: bool) -> Method:
    """The method at rank r with the same scale s; plain: without the start of a residual base."""
    delta: Any = method.delta
    changed: dict[str, Any] = {"r": r} | ({"kept": None} if hasattr(delta, "kept") else {})
    new = {"delta": dataclasses.replace(delta, **changed), "rules": tuple(rule.resized(r) for rule in method.rules)}
    scale: Any = method.scale
    if hasattr(scale, "alpha"):
        new["scale"] = dataclasses.replace(scale, alpha=scale.alpha * scale(delta.r) / scale(r))
    return method.replace(**new, **({"init": Kaiming()} if plain else {}))


def _resized(
    s: AdaptedSite, tensors: Mapping[str, Tensor], r: int, seed: int
) -> tuple[AdaptedSite, Roles, tuple[float, float]]:
    """A site at rank r, its tensors, and the squares of the error and of the norm of its update."""
    before = directions_of(s)
    new = dataclasses.replace(s, method=_with_rank(s.method, r, plain=bool(s.starts) and r < before))
    if r == before:
        return new, dict(tensors), (0.0, 0.0)
    if r < before:
        return new, *_truncated(s, tensors, r)
    norm = s.scale**2 * sum(float(product_svd(B, A).S.square().sum()) for B, A in _products(s, tensors))
    return new, _padded(s, new, tensors, seed), (0.0, norm)


def _padded(s: AdaptedSite, new: AdaptedSite, tensors: Mapping[str, Tensor], seed: int) -> Roles:
    """The tensors with new directions: drawn as those of a new adapter, and without effect."""
    delta, site = cast(Resizable, s.delta), s.site
    dims, own = delta.rank_dims(site), {role: shape for role, shape in new.shapes.items() if role in s.delta.roles}
    drawn = {role: torch.zeros(shape) for role, shape in own.items()}
    digest = hashlib.sha256(f"{seed}/{site.name}/rank".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    init = Kaiming() if s.init.residual_init else s.init
    init({role: drawn[role] for role in init.fills}, torch.zeros(0), site, new.scale, generator)
    silent = init.zeros(site) & dims.keys() or {"B"}
    roles = {}
    for role, t in tensors.items():
        source = role.removesuffix("0") if role in {start_name(x) for x in s.starts} else role
        if source not in dims:
            roles[role] = t
            continue
        empty = source in silent or source != role or source in s.delta.fixed_roles
        values = torch.zeros(own[source]) if empty else drawn[source]
        roles[role] = _with_leading(values.to(t.dtype), t, *dims[source])
    return roles


def _with_leading(values: Tensor, old: Tensor, dim: int, n: int) -> Tensor:
    """The values, with the old directions in the place of the first ones, in each of the n groups."""
    new = values.unflatten(dim, (n, -1))
    kept = old.unflatten(dim, (n, -1))
    new.narrow(dim + 1, 0, kept.shape[dim + 1]).copy_(kept)
    return values


def _truncated(s: AdaptedSite, tensors: Mapping[str, Tensor], r: int) -> tuple[Roles, tuple[float, float]]:
    """The tensors of the best approximation of rank r, and the squares of its error and of the update's norm."""
    delta = cast(Resizable, s.delta)
    dims, starts = delta.rank_dims(s.site), {start_name(role) for role in s.starts}
    products, lost, norm = [], 0.0, 0.0
    for B, A in _products(s, tensors):
        U, S, V = product_svd(B, A)
        products.append(Singular(U[:, :r], S[:r], V[:r]))
        lost, norm = lost + float(S[r:].square().sum()), norm + float(S.square().sum())
    found = delta.from_products(s.site, products)
    roles = {role: t for role, t in tensors.items() if role not in dims and role not in starts}
    roles |= {role: t.to(tensors[role].dtype).contiguous() for role, t in found.items()}
    return roles, (s.scale**2 * lost, s.scale**2 * norm)


def _products(s: AdaptedSite, tensors: Mapping[str, Tensor]) -> list[Factors]:
    """The products of a site's update of the unmodified base, without the scale: B A, or B A - B0 A0."""
    delta = cast(Resizable, s.delta)
    now = delta.products(s.site, tensors)
    if not s.starts:
        return now
    start = delta.products(s.site, {role: tensors[start_name(role)] for role in s.starts})
    return [(torch.cat([B, -B0], 1), torch.cat([A, A0])) for (B, A), (B0, A0) in zip(now, start, strict=True)]
