"""scale: an adapter whose update is multiplied by a number, exactly; its method and rank stay where it has a scale."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.mix import mix
from lorary.adapters.content_hash import content_hash
from lorary.adapters.provenance import Parent, Provenance
from lorary.errors import Diagnostic, MethodError, not_a
from lorary.methods.lora import Add
from lorary.model.ambient import mode_independent
from lorary.spec.fields import is_finite
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

_LARGEST = torch.finfo(torch.float32).max  # layers multiply by s in 32 bits


@mode_independent
def scale(adapter: Adapter, factor: float, *, base: nn.Module | None = None) -> Adapter:
    """An adapter whose update is multiplied by a number: W + factor * dW.

    Exact. A positive factor multiplies the method's own scale s, so that method, tensors and rank stay. A negative one,
    which turns what the adapter learned around, gives a LoRA with the same update.

    Args:
        adapter: of any method whose update is B A alone.
        factor: any number but 0.
        base: the base, for parameters that were trained in full.

    Raises:
        MethodError: the adapter has a gain or a shift (DoRA, GLoRA), or the factor is invalid; every reason.

    Example:
        >>> half = lorary.scale(lorary.load_adapter("out/adapter"), 0.5)
    """
    problems = not_a(Adapter, "an Adapter", adapter=adapter)
    if not is_finite(factor):
        problems.append(Diagnostic("factor", f"is {factor!r}, not a finite number"))
    elif not factor:
        problems.append(Diagnostic("factor", "is 0, which leaves the base as it is"))
    if problems:
        raise MethodError("cannot scale this adapter:", problems)
    factor = float(factor)
    try:
        result = mix({"the adapter": adapter}, [factor], base=base)
    except MethodError as error:
        raise MethodError("cannot scale this adapter:", error.problems) from None
    if factor > 0 and all(_has_scale(s) and factor * s.scale <= _LARGEST for s in adapter.sites):
        sites = tuple(dataclasses.replace(s, method=_scaled(s.method, factor)) for s in adapter.sites)
        method = _scaled(adapter.method, factor)
        result = dataclasses.replace(adapter, method=method, sites=sites, full=result.full)
    parent = Parent("", content_hash(adapter), factor)
    return dataclasses.replace(result, provenance=Provenance("scale", (parent,)))


def _has_scale(s: AdaptedSite) -> bool:
    """Whether the update is proportional to s; a quantised residual depends on s in another way."""
    return isinstance(s.join, Add) and (s.method.storage.writable or not s.starts)


def _scaled(method: Method, factor: float) -> Method:
    """The method with factor times its s."""
    old = cast(Any, method.scale)
    if old is None:
        return method
    field = "alpha" if hasattr(old, "alpha") else "s"
    return method.replace(scale=dataclasses.replace(old, **{field: factor * getattr(old, field)}))
