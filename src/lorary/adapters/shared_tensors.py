"""What all sites of an adapter share (VeRA's A and B): in a file once, or not at all but for a checksum.

A bank is as large as the largest site asks for in every direction, and each site holds its leading corner. Where an
init can draw it again from its seed, `lorary.json` may say what it has to be instead:

    "drawn": {"A": {"dtype": "F32", "sha256": ...}, "B": ...}

The SHA-256 is that of the numbers in 32 bits, little end first, zero where no site reaches.
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
from lorary.layers.adapted import leading_slice
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, adaptation, shared_shapes

_MOST_DRAWN = 2**30  # bytes; VeRA of rank 1,024 on the widest layers in use takes a quarter of it
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class SharedTensors(NamedTuple):
    """What all sites of an adapter share, put together once for everything that is written about it.

    Args:
        whole: role -> the whole of it.
        kept: whether a file has to hold it; otherwise the init's seed gives it bit for bit.
    """

    whole: dict[str, Tensor]
    kept: bool = True


def collect_shared(adapter: Adapter) -> SharedTensors:
    """The banks of an adapter."""
    whole = _gathered(adapter.sites, adapter.tensors)
    if not whole or adaptation(adapter.method).init.store_shared:
        return SharedTensors(whole)
    again = drawn(adapter.method, adapter.sites, {role: t.dtype for role, t in whole.items()})
    return SharedTensors(whole, kept=not all(torch.equal(again[role], bank) for role, bank in whole.items()))


def _gathered(placed: Sequence[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """role -> the whole of what the sites share, put together from the corner of each; zero where none reaches."""
    banks: dict[str, Tensor] = {}
    sizes = shared_shapes(placed)
    for p in placed:
        for role in sorted(p.delta.shared):
            part = tensors[p.site.name][role].detach()
            bank = banks.setdefault(role, part.new_zeros(sizes[role]))
            leading_slice(bank, tuple(part.shape)).copy_(part)
    return banks


def inconsistent_copies(adapter: Adapter, banks: Mapping[str, Tensor]) -> list[Diagnostic]:
    """The sites whose part of a bank is not what the others have."""
    return [
        Diagnostic(p.site.name, f"its {role} is not that of the other sites, which all share one")
        for p in adapter.sites
        for role in sorted(p.delta.shared)
        if not torch.equal(leading_slice(banks[role], p.shapes[role]), adapter.tensors[p.site.name][role])
    ]


def drawn(method: Method, placed: Sequence[AdaptedSite], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """role -> the bank that the method's seed gives, in these precisions."""
    whole = {role: torch.zeros(size) for role, size in shared_shapes(placed).items()}
    adaptation(method).init.share(whole)
    return _gathered(placed, leading_slices(placed, {role: t.to(dtypes[role]) for role, t in whole.items()}))


def leading_slices(placed: Sequence[AdaptedSite], banks: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """site -> role -> its part of each bank, a view."""
    return {
        p.site.name: {role: leading_slice(banks[role], p.shapes[role]) for role in sorted(p.delta.shared)}
        for p in placed
    }


def checksums(banks: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """What `lorary.json` holds of banks that are not in the file."""
    return {role: {"dtype": _CODES[bank.dtype], "sha256": _sha256(bank)} for role, bank in sorted(banks.items())}


def invalid_record(record: Any, placed: Sequence[AdaptedSite]) -> str:
    """What is wrong with the `drawn` of a `lorary.json`; empty where it is what it has to be."""
    sizes = shared_shapes(placed)
    if not isinstance(record, dict) or set(record) != set(sizes) or not sizes:
        return f"has to be about what the sites share: {', '.join(sorted(sizes)) or 'nothing'}"
    for entry in record.values():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "sha256"} or entry["dtype"] not in list(DTYPES):
            return f"has {show(entry)}; an entry is a dtype, one of {', '.join(DTYPES)}, and a SHA-256"
    needed, most = sum(4 * math.prod(size) for size in sizes.values()), min(_MOST_DRAWN, memory())
    return f"takes {needed:,} bytes to draw, more than the {most:,} that are accepted" if needed > most else ""


def regenerate(
    record: Mapping[str, Any], method: Method, placed: Sequence[AdaptedSite]
) -> tuple[dict[str, Tensor], list[Diagnostic]]:
    """The banks that a file left out, and which of them are not what the adapter was trained with."""
    banks = drawn(method, placed, {role: DTYPES[entry["dtype"]] for role, entry in record.items()})
    what = "what its seed gives here is not what the adapter was trained with (SHA-256 differs)"
    fix = "save it again with save_projections=True, on the base that it was trained on"
    wrong = [role for role, bank in banks.items() if _sha256(bank) != record[role]["sha256"]]
    return banks, [Diagnostic(role, what, fix) for role in sorted(wrong)]


def _sha256(bank: Tensor) -> str:
    return hashlib.sha256(bank.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()
