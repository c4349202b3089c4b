"""LowRankForm: a site of any adapter as everything downstream sees it, as a change of the unmodified base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.kinds import KINDS, kind_of
from lorary.model.checks import layer_mismatches
from lorary.model.residual_base import original_weight
from lorary.spec.placement import AdaptedSite, start_name


class LowRankForm(NamedTuple):
    """An adapter at one site as everything downstream sees it: y = gain * (W x + B A x) + b + shift.

    Args:
        B: [out, R], with the scale in it.
        A: [R, inp].
        gain: [out], or None for 1.
        shift: [out], or None for 0.
    """

    B: Tensor
    A: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None


def low_rank_forms(
    placed: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]], base: nn.Module | None = None
) -> dict[str, LowRankForm]:
    """site -> its form, in fp32. What the base gave up at the start is subtracted: such a site has twice its rank.

    Args:
        placed: the sites.
        tensors: site -> role -> tensor.
        base: the base, plain or with an adapter attached, for the joins whose gain or shift depends on its weights.

    Raises:
        MethodError: a join has no such form, or none without the base; the base lacks a layer. Each reason once.
    """
    forms, problems = {}, []
    modules = unwrapped_modules(base) if base is not None else {}
    for p in placed:
        own = tensors[p.site.name]
        W, b = _given(base, p, modules.get(p.site.name))
        try:
            BA, gain, shift = p.join.on_output(own, W, b, factors_on_base(p, own))
        except MethodError as error:
            problems += [Diagnostic(p.site.name, q.what, q.fix) for q in error.problems]
            continue
        forms[p.site.name] = LowRankForm(*BA, gain, shift)
    if problems:
        raise MethodError("this adapter has no low-rank form:", deduplicated(problems))
    return forms


def factors_on_base(p: AdaptedSite, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(s B [out, R], A [R, inp]) of a site in fp32, as a change of the unmodified weight; what joins it is left out."""
    B, A = (factor.float() for factor in p.delta.factors(p.site, tensors))
    if p.starts:
        start = {role: tensors[start_name(role)] for role in p.starts}
        B0, A0 = (factor.float() for factor in p.delta.factors(p.site, start))
        B, A = torch.cat([B, -B0], 1), torch.cat([A, A0])
    return p.scale * B, A


def _given(
    base: nn.Module | None, p: AdaptedSite, layer: nn.Module | None
) -> tuple[Callable[[], Tensor], Callable[[], Tensor | None]]:
    """What gives the base's own weight [out, inp] and bias [out] at a site, in fp32 on the CPU."""

    def found() -> Any:
        if base is None:
            what, fix = f"{type(p.method.join).__name__} has no such form without the base's weight", "give the base"
            raise MethodError("", [Diagnostic(p.site.name, what, fix)])
        if wrong := layer_mismatches(p.site, layer):
            raise MethodError("", wrong)
        return layer

    def weight() -> Tensor:
        kind = KINDS[cast(str, kind_of(found()))]
        W = original_weight(cast(nn.Module, base), p.site.name)  # whatever has been attached and moved
        return kind.matrix(SimpleNamespace(weight=W)).float().cpu()

    def bias() -> Tensor | None:
        b = getattr(found(), "bias", None)
        return None if b is None else b.detach().float().cpu()

    return weight, bias
