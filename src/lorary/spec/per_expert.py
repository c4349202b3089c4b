"""Methods over the experts of a block: a component sees the matrix of one expert, and its tensors get a leading E.

Where all experts share one adapter, its tensors are those of a single expert.

Shapes, factors, merged weights and starts of a site with experts are those of its experts one by one, stacked; a delta
that is `batched` computes the factors of all at once. Elsewhere each function asks the component itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.spec.calibration import CalibratedInit, Statistic
from lorary.spec.interfaces import Delta, Init, Join
from lorary.spec.layer import Factors, Shapes, Tensors
from lorary.spec.site import Site


def shapes_at(component: Delta | Join, site: Site, shared: Iterable[str] = ()) -> Shapes:
    """role -> shape of a component's tensors at a site; the roles that all sites share are those of one expert."""
    shapes = component.shapes(site.one)
    if not site.adapters:
        return shapes
    return {role: shape if role in shared else (site.adapters, *shape) for role, shape in shapes.items()}


def factors_at(delta: Delta, site: Site, tensors: Tensors) -> Factors:
    """(B [out, R], A [R, in]) of a site's adapter, or ([E, out, R], [E, R, in]) of those of its experts."""
    if not site.adapters or delta.batched:
        return delta.factors(site.one, tensors)
    pairs = [delta.factors(site.one, expert) for expert in _each(site, tensors, delta.shared)]
    return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])


def for_every_expert(site: Site, factors: Factors) -> Factors:
    """The factors of a site with a leading E if it has experts, which may share them: then as views."""
    if not site.one_adapter:
        return factors
    B, A = factors
    return B.expand(site.experts, *B.shape), A.expand(site.experts, *A.shape)


def joined_tensors(join: Join, site: Site, tensors: Tensors, scale: float) -> Tensors:
    """A site's tensors as `Join.merged` and `Join.on_output` take them: over all rows, and with the scale in them."""
    scaled = {
        role: scale * t.to(torch.promote_types(t.dtype, torch.float32)) if role in join.scaled else t
        for role, t in tensors.items()
    }
    return join.whole(site, scaled)


def merged_at(
    join: Join, site: Site, tensors: Tensors, W: Tensor, b: Tensor | None, BA: Factors, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(W', b') of a site: see `Join.merged`. With experts, BA has their leading E."""
    if not site.experts:
        return join.merged(joined_tensors(join, site, tensors, scale), W, b, BA)
    B, A = BA
    own = _each(site, {role: t for role, t in tensors.items() if role in join.roles | join.uses})
    scaled = (joined_tensors(join, site.one, expert, scale) for expert in own)
    merged = [join.merged(expert, W[e], None, (B[e], A[e]))[0] for e, expert in enumerate(scaled)]
    return torch.stack(merged), None


def fill(
    init: Init, values: dict[str, Tensor], W: Tensor, site: Site, scale: float, generator: torch.Generator
) -> None:
    """Fill a site's tensors in place: see `Init`."""
    if not site.adapters:
        init(values, W[0] if site.experts else W, site.one, scale, generator)
        return
    for e, expert in enumerate(_each(site, values)):
        init(expert, W[e], site.one, scale, generator)


def measured_at(
    init: CalibratedInit,
    statistic: Statistic,
    W: Callable[[], Tensor],
    site: Site,
    r: int,
    scale: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """role -> start of a site's tensors: see `CalibratedInit.measured`.

    Raises:
        ValueError: the data does not determine it, as where an expert has had no token.
    """
    if not site.experts:
        return init.measured(statistic, W, site, r, scale, generator)
    assert isinstance(statistic, Tensor)
    if idle := [e for e in range(site.experts) if not statistic[e].any()]:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        raise ValueError(f"expert {idle[0]}{more} of {site.experts} had no token of this data")
    each = [
        init.measured(gradient, lambda e=e: W()[e], site.one, r, scale, generator)  # type: ignore[misc]
        for e, gradient in enumerate(statistic)
    ]
    return {role: torch.stack([start[role] for start in each]) for role in each[0]}


def why_not_per_expert(site: Site, method: Any) -> list[str]:
    """The reasons why a method cannot adapt a site of experts."""
    if not site.experts:
        return []
    why = []
    if not method.join.per_expert:
        why.append(f"{type(method.join).__name__} has no form for fused experts yet")
    if method.delta.fused_for_all_kinds and not method.delta.batched:
        why.append(f"{type(method.delta).__name__} has no form for fused experts yet")
    if isinstance(method.init, CalibratedInit) and method.init.reads == "inputs":
        why.append(f"no calibration pass measures the inputs of fused experts yet ({type(method.init).__name__})")
    if site.one_adapter:
        why += _why_not_shared(method)
    if rules := ", ".join(type(rule).__name__ for rule in method.rules if not rule.per_expert):
        why.append(f"{rules} has no form for fused experts yet")
    return why


def _why_not_shared(method: Any) -> list[str]:
    """The reasons why a method has no adapter that all experts could share: it depends on the matrix of each."""
    fix = 'say experts="each"'
    why = []
    if method.join.roles | method.join.uses:
        why.append(f"{type(method.join).__name__} depends on the matrix of each expert, which share one adapter: {fix}")
    if method.init.residual_init:
        why.append(f"{type(method.init).__name__} starts at the matrix of each expert, which share one adapter: {fix}")
    return why


def experts_of(site: Site, tensors: Tensors, shared: Iterable[str] = ()) -> list[tuple[Site, dict[str, Tensor]]]:
    """Each expert's matrix as a site of its own, and the tensors there; the site alone if it has one adapter."""
    if not site.adapters:
        return [(site.one if site.experts else site, dict(tensors))]
    each = enumerate(_each(site, tensors, shared))
    return [(replace(site.one, name=expert_name(site.name, e)), own) for e, own in each]


def expert_name(name: str, e: int) -> str:
    """The name of one expert's matrix, as where experts are layers: `experts.3.down_proj` of `experts.down_proj`."""
    owner, dot, own = name.rpartition(".")
    return f"{owner}{dot}{e}.{own}"


def stack_experts(site: Site, each: Sequence[Tensors], shared: Iterable[str] = ()) -> dict[str, Tensor]:
    """role -> tensor of a site from those of its experts, as `experts_of` gives them."""
    if not site.adapters:
        return dict(each[0])
    return {r: t if r in shared else torch.stack([own[r] for own in each]) for r, t in each[0].items()}


def no_experts(sites: Iterable[Site], what: str) -> list[Diagnostic]:
    """The error of a function of adapters that works matrix by matrix; empty without fused experts."""
    where = [site for site in sites if site.experts]
    return [Diagnostic(s.name, f"holds the matrices of {s.experts} experts, and {what} takes one") for s in where[:1]]


def _each(site: Site, tensors: Tensors, shared: Iterable[str] = ()) -> list[dict[str, Tensor]]:
    """role -> tensor of each expert, views."""
    return [{role: t if role in shared else t[e] for role, t in tensors.items()} for e in range(site.experts)]
