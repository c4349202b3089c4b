"""The tensors that all sites of an adapter share (VeRA's A and B): stored once, or only as a checksum.

The shared tensor of a role is as large as the largest site needs in every direction, and each site uses its leading
slice. An init can regenerate them from its seed, and then `lorary.json` may hold only

    "drawn": {"A": {"dtype": "F32", "sha256": ...}, "B": ...}

The SHA-256 is over the numbers as little-endian 32-bit floats, zero where no site reaches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic
from lorary.files.strict_json import show
from lorary.files.tensor_file import DTYPES, memory
from lorary.layers.shared_projections import leading_slice
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, adaptation, shared_shapes

_MOST_DRAWN = 2**30  # bytes; VeRA of rank 1,024 on the widest layers in use takes a quarter of it
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
    shared = _collect(adapter.sites, adapter.tensors)
    if not shared or adaptation(adapter.method).init.store_shared:
        return SharedTensors(shared)
    again = regenerate(adapter.method, adapter.sites, {role: t.dtype for role, t in shared.items()})
    return SharedTensors(shared, stored=not all(torch.equal(again[role], t) for role, t in shared.items()))


def _collect(sites: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
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


def regenerate(method: Method, sites: Sequence[AdaptedSite], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """role -> the shared tensor that the method's seed gives, in these dtypes."""
    shared = {role: torch.zeros(size) for role, size in shared_shapes(sites).items()}
    adaptation(method).init.share(shared)
    return _collect(sites, leading_slices(sites, {role: t.to(dtypes[role]) for role, t in shared.items()}))


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
    record: Mapping[str, Any], method: Method, sites: Sequence[AdaptedSite]
) -> tuple[dict[str, Tensor], list[Diagnostic]]:
    """The shared tensors that a file left out, and those that differ from the ones of the training."""
    shared = regenerate(method, sites, {role: DTYPES[entry["dtype"]] for role, entry in record.items()})
    what = "its seed gives other numbers here than in training (SHA-256 differs)"
    fix = "save it again with save_projections=True, on the base that it was trained on"
    wrong = [role for role, t in shared.items() if _sha256(t) != record[role]["sha256"]]
    return shared, [Diagnostic(role, what, fix) for role in sorted(wrong)]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()
