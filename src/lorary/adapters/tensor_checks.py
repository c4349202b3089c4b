"""The checks of an adapter's tensors: names and shapes before any is read, values after reading and before writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorary.adapters.shared_tensors import leading_slices
from lorary.errors import Diagnostic, nearest
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import DTYPES, Entry, TensorSource, name_problem
from lorary.spec.placement import AdaptedSite, shared_shapes, start_name

if TYPE_CHECKING:
    from lorary.adapters.adapter import Adapter

Layout = dict[str, tuple[str, tuple[int, ...]]]  # role -> (name, shape) of a site's own tensors
_LARGEST = 1e6  # entries of a trained factor lie below 1e2: a file with larger ones is damaged or hostile


def expected_tensors(
    sites: Sequence[AdaptedSite], layout: Callable[[AdaptedSite], Layout], shared: Mapping[str, str]
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """name -> shape of all tensors of the sites, and the names that a zero tensor cannot replace.

    Args:
        sites: the adapted sites.
        layout: the layout of a site.
        shared: role -> name of the tensors that all sites share; empty where the file leaves them out.
    """
    expected, vital = {}, set(shared.values())
    for adapted in sites:
        starts, roles = adapted.starts, adapted.delta.roles
        for role, (name, shape) in layout(adapted).items():
            expected[name] = shape
            if starts or role not in roles:  # zero would not mean "no change" there
                vital.add(name)
    common = shared_shapes(sites)
    return expected | {name: common[role] for role, name in shared.items() if role in common}, vital


def read_tensors(
    file: TensorSource,
    names: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
    findings: Findings,
    explain: Callable[[str], str],
    vital: Collection[str],
    unbounded: Collection[str],
) -> dict[str, Tensor]:
    """name -> tensor for every expected tensor that the file holds; everything else becomes a finding.

    Args:
        file: the open file.
        names: the name here -> the name in the file.
        expected: name -> shape.
        findings: a wrong shape is fatal; what PEFT tolerates is tolerable.
        explain: describes a tensor that is not expected.
        vital: the names whose absence is fatal too.
        unbounded: the names whose values may be of any size, being the base's own.

    Raises:
        FileError: names or shapes are to be refused; no tensor has been read.
    """
    found = {name: file.header.tensors[written] for name, written in names.items()}
    usable = _compare(expected, found, findings, explain, vital)
    findings.raise_refused()
    raw = file.read(names[name] for name in usable)
    values = {name: raw[names[name]] for name in usable}
    findings.tolerable += unusable_values(values, unbounded)
    dtypes = sorted({entry.dtype for entry in found.values()})
    if len(dtypes) > 1:
        findings.notes.append(f"its tensors are of several dtypes: {', '.join(dtypes)}")
    return values


def site_tensors(
    sites: Sequence[AdaptedSite],
    values: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    decode: Callable[[AdaptedSite, Mapping[str, Tensor]], dict[str, Tensor]],
    shared: Mapping[str, Tensor],
    findings: Findings,
) -> dict[str, dict[str, Tensor]]:
    """site -> role -> tensor, with zeros (no change) for the tensors that the file lacks.

    Args:
        sites: the adapted sites.
        values: name -> tensor, as read.
        expected: name -> shape.
        decode: gives role -> tensor of a site's own from the tensors by name, or raises a FileError.
        shared: role -> what all sites share.
        findings: the sites that cannot be decoded.

    Raises:
        FileError: every reason to refuse the file.
    """
    own = {name: values[name] if name in values else torch.zeros(shape) for name, shape in expected.items()}
    slices = leading_slices(sites, shared)
    tensors = {}
    for adapted in sites:
        with findings.gathering():
            tensors[adapted.site.name] = decode(adapted, own) | slices[adapted.site.name]
    findings.raise_refused()
    return tensors


def _compare(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Entry],
    findings: Findings,
    explain: Callable[[str], str],
    vital: Collection[str],
) -> list[str]:
    """The expected names that the header has in the right shape."""
    unexpected = [name for name in found if name not in expected]
    usable = []
    for name, shape in expected.items():
        entry = found.get(name)
        if entry is None:
            near = nearest(name, unexpected, most=1)
            fix = f"the file has {named(near[0])}" if near else ""
            missing = findings.fatal if name in vital else findings.tolerable
            missing.append(Diagnostic(named(name), "is missing", fix))
        elif entry.shape != shape:
            what = f"has the shape {list(entry.shape)}, expected {list(shape)}"
            fix = "it is transposed" if entry.shape == shape[::-1] else ""
            findings.fatal.append(Diagnostic(named(name), what, fix))
        else:
            usable.append(name)
    findings.tolerable += [Diagnostic(named(name), explain(name)) for name in unexpected]
    return usable


# --- values -----------------------------------------------------------------------------------------------------------


def unwritable(tensors: Mapping[str, Tensor], unbounded: Collection[str] = ()) -> list[Diagnostic]:
    """The tensors, by their names in the file, that a strict reader would refuse.

    Args:
        tensors: name -> tensor.
        unbounded: the names whose values may be of any size, being the base's own.
    """
    problems = [Diagnostic(named(name), what) for name in tensors if (what := name_problem(name))]
    accepted = ", ".join(_name(dtype) for dtype in DTYPES.values())
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            what = f"is {_name(tensor.dtype)}; adapters are saved as {accepted}"
            problems.append(Diagnostic(named(name), what))
        elif tensor.is_meta:
            problems.append(Diagnostic(named(name), "has no values: its model is on the meta device"))
    return problems or unusable_values(tensors, unbounded)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unusable_values(tensors: Mapping[str, Tensor], unbounded: Collection[str] = ()) -> list[Diagnostic]:
    """The tensors with values that are not finite, or larger than those of any trained adapter."""
    largest = {name: largest_value(t) for name, t in tensors.items()}
    suspect = {name: t for name, t in tensors.items() if not math.isfinite(largest[name])}
    large = {name: t for name, t in tensors.items() if name not in unbounded and not largest[name] <= _LARGEST}
    return not_finite(suspect) + out_of_range(large)


def largest_value(tensor: Tensor) -> float:
    """The largest absolute value; NaN or infinity if a value is. One pass over the tensor, at the speed of memory."""
    if not tensor.numel():
        return 0.0
    lowest, highest = (extreme.item() for extreme in torch.aminmax(tensor.detach()))
    return float("nan") if math.isnan(lowest) or math.isnan(highest) else max(-lowest, highest)


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The tensors that hold NaN or infinity: how many, and where the first is."""
    problems = []
    for name, tensor in tensors.items():
        if not math.isfinite(largest_value(tensor)):
            bad = ~torch.isfinite(tensor)
            count = f"{int(bad.sum()):,} of {tensor.numel():,}"
            what = f"{count} values are NaN or infinite, the first at {bad.nonzero()[0].tolist()}"
            problems.append(Diagnostic(named(name), what))
    return problems


@torch.no_grad()
def out_of_range(tensors: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The tensors with a value that no training produces."""
    problems = []
    for name, tensor in tensors.items():
        largest = tensor.abs().nan_to_num(0, 0, 0).max().item() if tensor.numel() else 0.0
        if largest > _LARGEST:
            what = f"its largest value is {largest:.3g}; a trained adapter's stay far below {_LARGEST:,.0f}"
            problems.append(Diagnostic(named(name), what))
    return problems


def tensor_problems(
    name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> list[Diagnostic]:
    """The tensors of a site that are missing, unexpected, of another shape, or unusable."""
    if other := {role: type(t).__name__ for role, t in found.items() if not isinstance(t, Tensor)}:
        return [Diagnostic(name, f"{role} is a {kind}, not a tensor") for role, kind in other.items()]
    shapes = {role: tuple(t.shape) for role, t in found.items()}
    reasons = [
        f"{role} is {shapes.get(role, 'missing')}, expected {expected.get(role, 'no such tensor')}"
        for role in sorted({role for role, _ in expected.items() ^ shapes.items()})
    ]
    for role, t in found.items():
        if t.is_meta:
            reasons.append(f"{role} has no values: it is on the meta device")
        elif t.layout != torch.strided or not is_computable(t):
            reasons.append(
                f"{role} is a {t.layout} tensor of {t.dtype}, expected a dense one of floating-point numbers, of 16 "
                "bits or more"
            )
    return [Diagnostic(name, what) for what in reasons]


def is_computable(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers that PyTorch computes with; those of 8 bits only store values."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2


def adapter_problems(adapter: Adapter) -> list[Diagnostic]:
    """The tensors of an adapter in memory that are missing, unexpected, of another shape, unusable, or not finite."""
    tensors = adapter.tensors
    sites = ((s.site.name, s.stored) for s in adapter.sites)
    if wrong := [p for name, stored in sites for p in tensor_problems(name, stored, tensors.get(name, {}))]:
        return wrong
    every = {f"{site}: {role}": t for site, roles in tensors.items() for role, t in roles.items()}
    return not_finite(every | dict(adapter.full))


def alert_if_zero(
    sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]], findings: Findings
) -> None:
    """Note an adapter that changes nothing: every site only adds B A, and that is zero."""
    if sites and all(_adds_zero(adapted, tensors[adapted.site.name]) for adapted in sites):
        findings.alerts.append("every update is zero: this adapter changes nothing")


def _adds_zero(adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> bool:
    if not adapted.join.adds_apart or any(tensors[role].any() for role in adapted.join.roles):
        return False
    if adapted.starts:  # the update is the distance from the start
        return all(torch.equal(tensors[role], tensors[start_name(role)]) for role in adapted.starts)
    return not all(factor.any() for factor in adapted.factors(tensors))
