"""The notes of a plan: what is worth knowing before training, and no reason to refuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorary.model.full_parameters import parameters_by_pattern
from lorary.model.plan import FullParameter, human_bytes
from lorary.model.scan import Scan
from lorary.model.targets import abbreviate_paths
from lorary.spec.interfaces import Storage
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite


def plan_notes(
    scan: Scan, method: Method, placed: Sequence[AdaptedSite], full: Sequence[FullParameter], packed: Sequence[str]
) -> list[str]:
    """The notes of a plan, but for the weights that its targets cannot name (`unreached_notes`)."""
    return [
        *_rank_notes(placed),
        *_tie_notes(scan, placed),
        *_head_notes(scan, method, full),
        *_precision_notes(full),
        *_storage_notes(scan, placed, method.storage, packed),
        *(method.context.notes(scan.model) if method.context else []),
    ]


def unreached_notes(scan: Scan, total: int) -> list[str]:
    """Matrices that no target can name: fused experts, nn.MultiheadAttention and other weights outside of layers."""
    beyond = {}
    for path, m in scan.modules.items():
        if m.why_not_adaptable is None:
            continue
        for name, parameter in m.module.named_parameters(path, recurse=False):
            if parameter.dim() > 1 and parameter.numel() > total / 100:
                beyond[name] = parameter.numel()
    return [f"no adapter reaches {_short(beyond)} ({sum(beyond.values()) / total:.0%} of the model)"] if beyond else []


def _short(paths: Iterable[str]) -> str:
    return ", ".join(text for text, _ in abbreviate_paths(paths))


def _rank_notes(placed: Sequence[AdaptedSite]) -> list[str]:
    """Sites whose two factors hold more numbers than the matrix that they stand for."""
    wasteful = [
        p.site.name
        for p in placed
        if p.r * (p.site.out_features + p.site.in_features) > p.site.out_features * p.site.in_features
    ]
    if not wasteful:
        return []
    return [f"the factors are larger than the weight itself at {_short(wasteful)}: a lower rank loses nothing"]


def _tie_notes(scan: Scan, placed: Sequence[AdaptedSite]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    return [
        f"{p.site.name} shares its weight with {', '.join(others)}: the adapter acts on {p.site.name} alone, "
        "and merging gives it a weight of its own"
        for p in placed
        if (others := scan.modules[p.site.name].tied_to)
    ]


def _head_notes(scan: Scan, method: Method, full: Sequence[FullParameter]) -> list[str]:
    asked = set().union(*parameters_by_pattern(scan, method).values())
    heads = [f.name for f in full if f.name not in asked]
    return [f"the new head trains in full: {', '.join(heads)}"] if heads else []


def _precision_notes(full: Sequence[FullParameter]) -> list[str]:
    """Base parameters that train in 16 bits, where small steps are rounded away."""
    coarse = [f.name for f in full if f.trains and f.bytes < 4 * f.size]
    if not coarse:
        return []
    return [f"{_short(coarse)} would train in 16 bits, where small steps are rounded away: load the base in float32"]


def _storage_notes(scan: Scan, placed: Sequence[AdaptedSite], storage: Storage, packed: Sequence[str]) -> list[str]:
    if storage.writable:
        return []
    name, notes = type(storage).__name__, []
    if packed:
        weights = [scan.parameter(f"{path}.weight") for path in packed]
        now = human_bytes(sum(storage.bytes(W.numel(), W.element_size()) for W in weights))
        was = human_bytes(sum(W.numel() * W.element_size() for W in weights))
        notes.append(f"{name} packs {len(packed)} layers, in {now} instead of {was}")
    kept = [p.site.name for p in placed if p.site.name not in set(packed) and not scan.is_quantised(p.site.name)]
    if kept:
        notes.append(f"{_short(kept)} stays as it is: {name} packs linear layers whose weight is theirs alone")
    return notes
