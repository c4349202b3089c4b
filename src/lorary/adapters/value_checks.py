"""Checks of the values of an adapter's tensors, before they are written and after they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.safetensors_header import name_problem
from lorary.files.strict_json import named
from lorary.files.tensor_file import DTYPES
from lorary.methods.lora import Add
from lorary.spec.placement import AdaptedSite, start_name

_LARGEST = 1e6  # entries of a trained factor lie below 1e2: a file with larger ones is damaged or hostile


def unwritable(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The tensors, by their names in the file, that no reader would accept."""
    problems = [Diagnostic(named(name), what) for name in tensors if (what := name_problem(name))]
    accepted = ", ".join(_name(dtype) for dtype in DTYPES.values())
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            what = f"is {_name(tensor.dtype)}; adapters are saved as {accepted}"
            problems.append(Diagnostic(named(name), what))
        elif tensor.is_meta:
            problems.append(Diagnostic(named(name), "has no values: its model is on the meta device"))
    return problems or not_finite(tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The tensors that hold NaN or infinity: how many, and where the first is."""
    problems = []
    for name, tensor in tensors.items():
        bad = ~torch.isfinite(tensor)
        if bad.any():
            count = f"{int(bad.sum()):,} of {tensor.numel():,}"
            what = f"{count} values are NaN or infinite, the first at {bad.nonzero()[0].tolist()}"
            problems.append(Diagnostic(named(name), what))
    return problems


def out_of_range(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The tensors with a value that no training produces."""
    problems = []
    for name, tensor in tensors.items():
        largest = tensor.abs().nan_to_num(0, 0, 0).max().item() if tensor.numel() else 0.0
        if largest > _LARGEST:
            what = f"its largest value is {largest:.3g}; a trained adapter's stay far below {_LARGEST:,.0f}"
            problems.append(Diagnostic(named(name), what))
    return problems


def alert_if_zero(
    sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]], findings: Findings
) -> None:
    """Note an adapter that changes nothing: every site only adds B A, and that is zero."""
    if sites and all(_adds_zero(adapted, tensors[adapted.site.name]) for adapted in sites):
        findings.alerts.append("every update is zero: this adapter changes nothing")


def _adds_zero(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> bool:
    if not isinstance(adapted.join, Add):
        return False
    if adapted.starts:  # the update is the distance from the start
        return all(torch.equal(tensors[role], tensors[start_name(role)]) for role in adapted.starts)
    return not all(factor.any() for factor in adapted.delta.factors(adapted.site, tensors))
