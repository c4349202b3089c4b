"""Hypotheses on what a server computes instead of an adapter: another scale, only some sites, no trained parameters.

Each is computed: the adapter's low-rank form is put on the base, with a factor for the update of every site.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter, without_empty_sites
from lorary.adapters.compose.plain_lora import plain_lora
from lorary.adapters.low_rank_form import low_rank_forms
from lorary.adapters.switch import switch
from lorary.analysis.verify.observed import Observed, distance, our_values
from lorary.errors import MethodError
from lorary.layers.adapted import adapted_layers
from lorary.model.state import base_parameter, eval_mode

_MOST_EVALUATIONS = 400  # of the model on all probes
_STEPS = 16  # of the search for a factor


@dataclass(frozen=True)
class Hypothesis:
    """A guess at what the server computes.

    Args:
        kind: right, no-op, wrong scale, or partial.
        what: for the reader: "alpha / r instead of alpha / sqrt(r)".
        distance: of its log-probabilities from the server's, in nats.
        factors: site -> the factor of its update; 1 where absent.
    """

    kind: str
    what: str
    distance: float
    factors: Mapping[str, float]


class Trial:
    """An adapter on its base with a factor for every site, compared with what a server was observed to compute.

    Args:
        model: the base, with the low-rank form attached.
        several: what was observed.
        values: the observed numbers.
        full: the base parameters that the adapter trained: name -> (the base's value, the adapter's).
        enough: the distance below which a hypothesis explains the server.
    """

    def __init__(
        self,
        model: nn.Module,
        several: Sequence[Observed],
        values: Sequence[float],
        full: Mapping[str, tuple[Tensor, Tensor]],
        enough: float,
    ) -> None:
        self.model, self.several, self.values, self.full, self.enough = model, several, values, full, enough
        self.B = {name: layer.params["B"].detach().clone() for name, layer in adapted_layers(model).items()}
        self.evaluations = 0

    @torch.no_grad()
    def distance(self, factors: Mapping[str, float], *, full: bool = True) -> float:
        """The distance of the server from the adapter with these factors, with or without its trained parameters."""
        for name, layer in adapted_layers(self.model).items():
            layer.params["B"].copy_(self.B[name] * factors.get(name, 1.0))
        for name, (before, after) in self.full.items():
            base_parameter(self.model, name).copy_(after if full else before)
        self.evaluations += 1
        return distance(self.values, our_values(self.model, self.several))


@contextmanager
def trial(
    model: nn.Module, adapter: Adapter, several: Sequence[Observed], values: Sequence[float], enough: float
) -> Iterator[Trial]:
    """A block in which the plain low-rank form of an adapter is on its base.

    Of DoRA and GLoRA the form is without their gains and shifts, which a server may leave out too.
    """
    full = {name: (base_parameter(model, name).detach().clone(), value) for name, value in adapter.full.items()}
    switch(model, _plain(adapter, model), force=True)
    try:
        with eval_mode(model):
            yield Trial(model, several, values, full, enough)
    finally:
        switch(model, None)


def _plain(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter's updates B A as a LoRA with its scale in B."""
    compact = without_empty_sites(adapter)
    untied = [replace(a, share="") for a in compact.sites]  # tied sites may get different factors
    forms = low_rank_forms(untied, compact.tensors, model)
    factors = {name: (form.B.contiguous(), form.A.contiguous()) for name, form in forms.items()}
    own = adapter.method
    method, sites, tensors = plain_lora(untied, factors, storage=own.storage, context=own.context, full=adapter.full)
    return replace(adapter, method=method, sites=sites, tensors=tensors, notes=())


def has_factors(adapter: Adapter, model: nn.Module) -> bool:
    """Whether the adapter has factors at all of its sites, which a server may compute with otherwise."""
    try:
        return all(len(form.A) for form in without_empty_sites(adapter).low_rank(model).values())
    except MethodError:
        return False


def is_plain(adapter: Adapter, model: nn.Module) -> bool:
    """Whether the adapter is its updates B A alone, so that its form without gains and shifts is itself."""
    try:
        return all(form.is_plain for form in adapter.low_rank(model).values())
    except MethodError:
        return False


def explained(adapter: Adapter, found: Trial, progress: Callable[[str], object]) -> Hypothesis | None:
    """The best hypothesis of the first stage that explains the server, the simplest first; else the nearest of all.

    Args:
        adapter: the adapter.
        found: it, on its base.
        progress: is told what is tried.
    """
    best: Hypothesis | None = None
    for what, stage in _STAGES.items():
        for hypothesis in stage(adapter, found):
            progress(f"trying {what}: {hypothesis.what}")
            if best is None or hypothesis.distance < best.distance:
                best = hypothesis
            if best.distance < found.enough / 2 or found.evaluations > _MOST_EVALUATIONS:
                return best
        if best is not None and best.distance <= found.enough:
            return best
    return best


# --- the scale --------------------------------------------------------------------------------------------------------


def _scales(adapter: Adapter, found: Trial) -> Iterator[Hypothesis]:
    """The scales that programs are known to compute with instead of an adapter's own."""
    tried: list[dict[str, float]] = [{}]
    usual = _usual(adapter)
    for what, scale in _SCALES.items():
        factors = {}
        for adapted in adapter.sites:
            r = adapted.shapes["A"][0] if "A" in adapted.shapes else adapted.r
            theirs = scale(adapted.scale, adapted.alpha, float(r), usual)
            factors[adapted.site.name] = theirs / adapted.scale if theirs and adapted.scale else 1.0
        factors = {name: factor for name, factor in factors.items() if not math.isclose(factor, 1.0)}
        if factors not in tried:
            tried.append(factors)
            yield Hypothesis("wrong scale", what, found.distance(factors), factors)


def _usual(adapter: Adapter) -> tuple[float, float]:
    """The alpha and the rank of most sites; alpha is 0 where they have none."""
    return Counter((a.alpha or 0.0, float(a.r)) for a in adapter.sites).most_common(1)[0][0]


_Scale = Callable[[float, float | None, float, tuple[float, float]], float | None]
_SCALES: dict[str, _Scale] = {
    "alpha / r": lambda s, alpha, r, usual: alpha and alpha / r,
    "alpha / sqrt(r)": lambda s, alpha, r, usual: alpha and alpha / math.sqrt(r),
    "alpha and r of most layers for all": lambda s, alpha, r, usual: usual[0] / usual[1],
    "alpha of most layers for all": lambda s, alpha, r, usual: usual[0] / r,
    "alpha, not divided by r": lambda s, alpha, r, usual: alpha,
    "1, the scale left out": lambda s, alpha, r, usual: 1.0,
    "1 / r, alpha left out": lambda s, alpha, r, usual: 1 / r,
    "its own divided by r": lambda s, alpha, r, usual: s / r,
    "its own divided by sqrt(r)": lambda s, alpha, r, usual: s / math.sqrt(r),
    "its own times sqrt(r)": lambda s, alpha, r, usual: s * math.sqrt(r),
    "its own times r": lambda s, alpha, r, usual: s * r,
    "its own times alpha": lambda s, alpha, r, usual: alpha and s * alpha,
    "its own divided by alpha": lambda s, alpha, r, usual: alpha and s / alpha,
    "its own squared": lambda s, alpha, r, usual: s * s,
}
"""Another scale that programs compute with -> (scale, alpha, rank, (alpha, rank) of most sites) -> its scale."""


def _factor(adapter: Adapter, found: Trial) -> Iterator[Hypothesis]:
    """The one factor of all updates that is nearest to the server, by golden-section search of its logarithm."""
    names = list(found.B)
    ratio = (math.sqrt(5) - 1) / 2
    grid = [math.log(2) * i for i in range(-6, 7)]
    tried = {x: found.distance(dict.fromkeys(names, math.exp(x))) for x in grid}
    centre = min(tried, key=lambda x: tried[x])
    low, high = centre - math.log(2), centre + math.log(2)
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        for x in (left, right):
            if x not in tried:
                tried[x] = found.distance(dict.fromkeys(names, math.exp(x)))
        if abs(tried[left] - tried[right]) < 0.01 * min(tried.values()) and min(tried.values()) > 10 * found.enough:
            break  # it is flat here, and far from the server
        low, high = (low, right) if tried[left] < tried[right] else (left, high)
    x = min(tried, key=lambda x: tried[x])
    factors = dict.fromkeys(names, math.exp(x))
    yield Hypothesis("wrong scale", f"{math.exp(x):.3g} times its own", tried[x], factors)


# --- the sites --------------------------------------------------------------------------------------------------------


def _left_out(adapter: Adapter, found: Trial) -> Iterator[Hypothesis]:
    """Whole kinds of layers, or all blocks above or below one, left out."""
    names = list(found.B)
    if found.full:
        what = f"without the {len(found.full)} parameters trained in full"
        yield Hypothesis("partial", what, found.distance({}, full=False), {})
    kinds: dict[str, list[str]] = {}
    for name in names:
        for part in {name.rpartition(".")[2], name.split(".")[-2] if "." in name else name}:
            kinds.setdefault(part, []).append(name)
    blocks = sorted({block for name in names if (block := _block(name)) is not None})
    groups = {f"without {kind}": own for kind, own in kinds.items() if not kind.isdecimal()}
    groups |= {
        f"only {kind}": [n for n in names if n not in own] for kind, own in kinds.items() if not kind.isdecimal()
    }
    for k in blocks[1:]:
        groups[f"without blocks {k} and above"] = [n for n in names if (_block(n) or 0) >= k]
        groups[f"without blocks below {k}"] = [n for n in names if _block(n) is not None and (_block(n) or 0) < k]
    seen: list[set[str]] = []
    for what, left in groups.items():
        if 0 < len(left) < len(names) and set(left) not in seen:
            seen.append(set(left))
            yield _without(found, left, what)


def _greedy(adapter: Adapter, found: Trial) -> Iterator[Hypothesis]:
    """Sites left out one after the other, each the one that brings the result nearest to the server."""
    names, left = list(found.B), list[str]()
    nearest = found.distance({})
    while len(left) < len(names) - 1:
        every = [_without(found, [*left, name], "") for name in names if name not in left]
        best = min(every, key=lambda hypothesis: hypothesis.distance)
        if best.distance >= nearest or found.evaluations > _MOST_EVALUATIONS:
            return
        left, nearest = list(best.factors), best.distance
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        yield replace(best, what=f"without {shown}")


def _without(found: Trial, left: Sequence[str], what: str) -> Hypothesis:
    factors = dict.fromkeys(left, 0.0)
    return Hypothesis("partial", f"{what} ({len(left)} of {len(found.B)} sites)", found.distance(factors), factors)


def _block(name: str) -> int | None:
    """The number of the block that a site is in."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


_STAGES = {"a scale": _scales, "left-out layers": _left_out, "a factor": _factor, "left-out sites": _greedy}
