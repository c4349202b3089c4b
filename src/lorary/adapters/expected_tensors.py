"""The tensors that a file must hold: compared with its header before any is read, then read, checked and decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorary.adapters.shared_tensors import leading_slices
from lorary.adapters.value_checks import not_finite, out_of_range
from lorary.errors import Diagnostic, nearest
from lorary.files.findings import Findings
from lorary.files.safetensors_header import Entry
from lorary.files.strict_json import named
from lorary.files.tensor_file import TensorFile
from lorary.spec.placement import AdaptedSite, shared_shapes

Layout = dict[str, tuple[str, tuple[int, ...]]]  # role -> (name, shape) of a site's own tensors


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
        for role, (name, shape) in layout(adapted).items():
            expected[name] = shape
            if adapted.starts or role not in adapted.delta.roles:  # zero would not mean "no change" there
                vital.add(name)
    common = shared_shapes(sites)
    return expected | {name: common[role] for role, name in shared.items() if role in common}, vital


def read_tensors(
    file: TensorFile,
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
    findings.tolerable += not_finite(values)
    findings.tolerable += out_of_range({name: t for name, t in values.items() if name not in unbounded})
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
