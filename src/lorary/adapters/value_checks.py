"""Checks of what a file's tensors hold, once it is known that they are the right ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.files.strict_json import named
from lorary.methods.lora import Add
from lorary.spec.placement import AdaptedSite, start_name

_LARGEST = 1e6  # a trained factor's entries lie below 1e2; where this is passed, a file is damaged or hostile


def not_finite(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """One problem for every tensor that holds NaN or infinity: how many, and where the first is."""
    problems = []
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            count = f"{int(bad.sum()):,} of {tensor.numel():,}"
            what = f"{count} values are NaN or infinite, the first at {bad.nonzero()[0].tolist()}"
            problems.append(Diagnostic(named(name), what))
    return problems


def out_of_range(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """One problem for every tensor with a value that no training produces."""
    problems = []
    for name, tensor in tensors.items():
        largest = tensor.abs().nan_to_num(0, 0, 0).max().item() if tensor.numel() else 0.0
        if largest > _LARGEST:
            what = f"its largest value is {largest:.3g}; a trained adapter's stay far below {_LARGEST:,.0f}"
            problems.append(Diagnostic(named(name), what))
    return problems


def does_nothing(placed: tuple[AdaptedSite, ...], tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether the adapter can be told to change nothing: every site only adds B A, and that is zero."""
    return bool(placed) and all(_adds_zero(p, tensors[p.site.name]) for p in placed)


def _adds_zero(p: AdaptedSite, tensors: Mapping[str, Tensor]) -> bool:
    if not isinstance(p.method.join, Add):
        return False
    if p.starts:  # its update is what it has moved since
        return all(torch.equal(tensors[role], tensors[start_name(role)]) for role in p.starts)
    return not all(factor.any() for factor in p.delta.factors(p.site, tensors))
