"""Tensors that several sites share: projections of all sites (VeRA), and the tensors of tied sites (LoRA-drop).

VeRA's A and B are stored once, or only as a checksum. The shared tensor of a role is as large as the largest site needs
in every direction, and each site uses its leading slice. An init can regenerate them from its seed, and then
`lorary.json` may hold only

    "drawn": {"A": {"dtype": "F32", "sha256": ...}, "B": ...}

The SHA-256 is over the numbers as little-endian 32-bit floats, zero where no site reaches.

Tied sites train one set of tensors, which is stored once in lorary's file and at every site in PEFT's. After reading
either, such a set is one tensor for all its sites, as in training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import DTYPES, memory, name_problem
from lorary.layers.shared_projections import leading_slice
from lorary.spec.placement import AdaptedSite, inconsistent_ties, shared_shapes

_MOST_DRAWN = 2**30  # bytes; VeRA of rank 1,024 on the widest layers in use takes a quarter of it
_BAR = "|"  # between a site and a role in the keys of lorary's file
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SharedTensors(NamedTuple):
    """The tensors that all sites of an adapter share, collected once for everything that is written.

    Args:
        tensors: role -> the shared tensor.
        stored: whether a file must hold them; otherwise the init regenerates them bit for bit.
    """

    tensors: dict[str, Tensor]
    stored: bool = True


def collect_shared(adapter: Adapter) -> SharedTensors:
    """The shared tensors of an adapter."""
    shared = whole_tensors(adapter.sites, adapter.tensors)
    if not shared or _sharing(adapter.sites)[0].init.store_shared:
        return SharedTensors(shared)
    again = regenerate(adapter.sites, {role: t.dtype for role, t in shared.items()})
    return SharedTensors(shared, stored=not all(torch.equal(again[role], t) for role, t in shared.items()))


def whole_tensors(sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """role -> the shared tensor, put together from each site's leading slice; zero where no site reaches."""
    shared: dict[str, Tensor] = {}
    sizes = shared_shapes(sites)
    for adapted in sites:
        for role in sorted(adapted.delta.shared):
            part = tensors[adapted.site.name][role].detach()
            tensor = shared.setdefault(role, part.new_zeros(sizes[role]))
            leading_slice(tensor, tuple(part.shape)).copy_(part)
    return shared


def inconsistent_copies(adapter: Adapter, shared: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The sites whose slice of a shared tensor differs from that of the others."""
    return [
        Diagnostic(site, f"its {role} differs from the other sites', which all share one")
        for site, slices in leading_slices(adapter.sites, shared).items()
        for role, part in slices.items()
        if not torch.equal(part, adapter.tensors[site][role])
    ]


def _sharing(sites: Sequence[AdaptedSite]) -> list[AdaptedSite]:
    return [adapted for adapted in sites if adapted.delta.shared]


def regenerate(sites: Sequence[AdaptedSite], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """role -> the shared tensor that the seed of their method gives, in these dtypes."""
    shared = {role: torch.zeros(size) for role, size in shared_shapes(sites).items()}
    _sharing(sites)[0].init.share(shared)
    return whole_tensors(sites, leading_slices(sites, {role: t.to(dtypes[role]) for role, t in shared.items()}))


def leading_slices(sites: Sequence[AdaptedSite], shared: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """site -> role -> its slice of each shared tensor, a view."""
    return {
        adapted.site.name: {
            role: leading_slice(shared[role], adapted.shapes[role]) for role in sorted(adapted.delta.shared)
        }
        for adapted in sites
    }


def checksums(shared: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The `drawn` of `lorary.json`: the dtype and the checksum of each shared tensor."""
    return {role: {"dtype": _CODES[t.dtype], "sha256": _sha256(t)} for role, t in sorted(shared.items())}


def invalid_record(record: Any, sites: Sequence[AdaptedSite]) -> str:
    """The error in the `drawn` of a `lorary.json`; empty if it is valid."""
    sizes = shared_shapes(sites)
    if not isinstance(record, dict) or set(record) != set(sizes) or not sizes:
        return f"must describe the shared tensors: {', '.join(sorted(sizes)) or 'none'}"
    for entry in record.values():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "sha256"} or entry["dtype"] not in list(DTYPES):
            return f"has {show(entry)}; an entry is a dtype, one of {', '.join(DTYPES)}, and a SHA-256"
    needed, most = sum(4 * math.prod(size) for size in sizes.values()), min(_MOST_DRAWN, memory())
    return f"takes {needed:,} bytes to draw, more than the {most:,} that are accepted" if needed > most else ""


def regenerate_recorded(
    record: Mapping[str, Any], sites: Sequence[AdaptedSite]
) -> tuple[dict[str, Tensor], list[Diagnostic]]:
    """The shared tensors that a file left out, and those that differ from the ones of the training."""
    shared = regenerate(sites, {role: DTYPES[entry["dtype"]] for role, entry in record.items()})
    what = "its seed gives other numbers here than in training (SHA-256 differs)"
    fix = "save it again with save_projections=True, on the base that it was trained on"
    wrong = [role for role, t in shared.items() if _sha256(t) != record[role]["sha256"]]
    return shared, [Diagnostic(role, what, fix) for role in sorted(wrong)]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


# --- tied sites -------------------------------------------------------------------------------------------------------


def tensor_key(adapted: AdaptedSite, role: str) -> str:
    """The name of a tensor in lorary's file: one for all sites of a share."""
    return f"|{adapted.share}|{role}" if adapted.share else f"{adapted.site.name}|{role}"


def share_name(value: object) -> str:
    """The name of a share, checked.

    Raises:
        ValueError: a file cannot hold it.
    """
    if not isinstance(value, str) or not value or _BAR in value or name_problem(value):
        raise ValueError(f"`share` is {show(value)}; it is a name of printable ASCII without {_BAR}")
    return value


def tie_problems(sites: Sequence[AdaptedSite]) -> list[Diagnostic]:
    """The sites that cannot be tied as recorded, or whose names a file could not tell from shared tensors."""
    found = inconsistent_ties(sites)
    for adapted in sites:
        name = adapted.site.name
        if adapted.share:
            try:
                share_name(adapted.share)
            except ValueError as error:
                found.append(Diagnostic(name, str(error)))
        if name.startswith(_BAR):
            what = f"begins with {_BAR}, like the names of shared tensors"
            found.append(Diagnostic(named(name), what, "rename the module"))
    return found


def rejoined(
    sites: Iterable[AdaptedSite], tensors: Mapping[str, dict[str, Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], list[Diagnostic]]:
    """site -> role -> tensor, one for all sites of a share; and the sites whose tensors differ from the first one's."""
    joined, found = dict(tensors), []
    firsts: dict[str, str] = {}
    for adapted in sites:
        name = adapted.site.name
        if not adapted.share:
            continue
        first = firsts.setdefault(adapted.share, name)
        own, others = tensors[name], tensors[first]
        for role in sorted(own.keys() | others.keys()):
            if not _same(own.get(role), others.get(role)):
                found.append(Diagnostic(name, f"its {role} differs from that of {first}, to which it is tied"))
        joined[name] = others
    return joined, found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)
