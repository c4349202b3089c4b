"""The notes of a plan: hints that are worth reading before training, but not errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorary.model._full_parameters import parameters_by_pattern
from lorary.model.plan import FullParameter, human_bytes
from lorary.model.scan import Scan
from lorary.model.targets import abbreviate_paths
from lorary.spec.interfaces import Storage
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite


def plan_notes(
    scan: Scan, method: Method, sites: Sequence[AdaptedSite], full: Sequence[FullParameter], quantized: Sequence[str]
) -> list[str]:
    """The notes of a plan, except for the weights that its targets cannot reach (`unreached_notes`)."""
    return [
        *_rank_notes(sites),
        *_tie_notes(scan, sites),
        *_head_notes(scan, method, full),
        *_precision_notes(full),
        *_storage_notes(scan, sites, method.storage, quantized),
        *(method.context.notes(scan.model) if method.context else []),
    ]


def unreached_notes(scan: Scan, total: int) -> list[str]:
    """Matrices that targets cannot reach: fused experts, nn.MultiheadAttention and other weights outside of layers."""
    unreached = {
        name: parameter.numel()
        for path, m in scan.modules.items()
        if m.why_not_adaptable is not None
        for name, parameter in m.module.named_parameters(path, recurse=False)
        if parameter.dim() > 1 and parameter.numel() > total / 100
    }
    return _note(f"no adapter reaches {{}} ({sum(unreached.values()) / total:.0%} of the model)", unreached)


def quantized_size(scan: Scan, storage: Storage, quantized: Sequence[str]) -> tuple[int, int]:
    """The bytes of these layers' weights now, and once they are quantised."""
    weights = [scan.parameter(f"{path}.weight") for path in quantized]
    dense = sum(W.numel() * W.element_size() for W in weights)
    return dense, sum(storage.bytes(W.numel(), W.element_size()) for W in weights)


def _note(text: str, paths: Iterable[str]) -> list[str]:
    """The text with the paths in place of `{}`; nothing if there are none."""
    names = ", ".join(name for name, _ in abbreviate_paths(paths))
    return [text.format(names)] if names else []


def _rank_notes(sites: Sequence[AdaptedSite]) -> list[str]:
    """Sites whose two factors are larger than the matrix itself."""
    wasteful = [
        p.site.name
        for p in sites
        if p.r * (p.site.out_features + p.site.in_features) > p.site.out_features * p.site.in_features
    ]
    return _note("the factors are larger than the weight itself at {}: a lower rank loses nothing", wasteful)


def _tie_notes(scan: Scan, sites: Sequence[AdaptedSite]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    return [
        f"{p.site.name} shares its weight with {', '.join(others)}: the adapter acts on {p.site.name} alone, "
        "and merging gives it a weight of its own"
        for p in sites
        if (others := scan.modules[p.site.name].tied_to)
    ]


def _head_notes(scan: Scan, method: Method, full: Sequence[FullParameter]) -> list[str]:
    asked = set().union(*parameters_by_pattern(scan, method).values())
    heads = [f.name for f in full if f.name not in asked]
    return [f"the new head trains in full: {', '.join(heads)}"] if heads else []


def _precision_notes(full: Sequence[FullParameter]) -> list[str]:
    """Base parameters that train in 16 bits, where small steps are rounded away."""
    coarse = [f.name for f in full if f.trains and f.bytes < 4 * f.size]
    return _note("{} would train in 16 bits, where small steps are rounded away: load the base in float32", coarse)


def _storage_notes(scan: Scan, sites: Sequence[AdaptedSite], storage: Storage, quantized: Sequence[str]) -> list[str]:
    """How many layers are quantised, and the adapted ones that are not."""
    if storage.writable:
        return []
    name, notes = type(storage).__name__, []
    if quantized:
        dense, stored = map(human_bytes, quantized_size(scan, storage, quantized))
        notes.append(f"{name} quantises {len(quantized)} layers, in {stored} instead of {dense}")
    kept = [p.site.name for p in sites if p.site.name not in set(quantized) and not scan.is_quantised(p.site.name)]
    return notes + _note(f"{{}} stays dense: {name} quantises linear layers that are not tied", kept)
