"""The plain LoRA with given factors: the result of everything that computes an adapter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lorary.methods.lora import Add, ConstantScale, Kaiming, LowRank
from lorary.spec.context import Context
from lorary.spec.interfaces import Factors, Storage, Unquantized
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

PLAIN_LORA = Method(LowRank(1), Kaiming(), ConstantScale(1.0), Add())  # its scale is in B; sites have their own ranks

Tensors = dict[str, dict[str, Tensor]]  # site -> role -> tensor


def plain_lora(
    sites: Iterable[AdaptedSite],
    factors: Mapping[str, Factors],
    *,
    storage: Storage | None = None,
    context: Context | None = None,
    full: Iterable[str] = (),
) -> tuple[Method, tuple[AdaptedSite, ...], Tensors]:
    """(method, sites, tensors) of the LoRA whose update at each site is B A, with the scale in B.

    Args:
        sites: the layers, with any method; those without factors are left out. The parts of a fused weight become one:
            the rows outside of them are zero in B. Experts keep one adapter where its factors have no leading E. Sites
            that share tensors have equal factors, and share them again.
        factors: site -> (B [out, R], A [R, in]). Sites may differ in rank; the method has the largest.
        storage: of the base's weights.
        context: the RoPE scaling and attention.
        full: the names of the parameters trained in full.
    """
    common: dict[str, Any] = {"storage": storage or Unquantized(), "context": context, "full": tuple(full)}

    @functools.cache  # a method checks itself, which takes longer than the sites' tensors
    def of_rank(r: int) -> Method:
        return PLAIN_LORA.replace(delta=LowRank(r), **common)

    added, tensors, shared = [], Tensors(), Tensors()
    for s in sites:
        name = s.site.name
        if name in factors:
            B, A = factors[name]
            roles = shared.setdefault(s.share or name, {"A": A, "B": B})
            tensors[name] = dict(roles)
            site = s.site.whole if roles["A"].dim() == 3 else dataclasses.replace(s.site, parts=())
            added.append(dataclasses.replace(s, site=site, method=of_rank(roles["A"].shape[-2])))
    return of_rank(max(a.r for a in added)) if added else Method(**common), tuple(added), tensors
