"""The towers of a multimodal model: its language model, its vision and audio encoders, and the projector between them.

A tower is a part of the model whose configuration is one of the model's own sub-configurations, so that no list of
models or names is needed. The projector is what lies in no tower, without the output head; some models (Qwen2-VL and
its successors) hold it inside the vision encoder, as `merger`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.model.scan import Scan
from lorary.spec.placement import AdaptedSite, unique_tensor_sets

PROJECTOR = "projector"
_OF_CONFIG = {"text_config": "language", "vision_config": "vision", "audio_config": "audio"}
TOWERS = (*_OF_CONFIG.values(), PROJECTOR)
_MERGER = re.compile(r"(?:.*\.)?(?:merger|deepstack_merger_list)(?:\..*)?")
LINEAR_KINDS = ("linear", "transposed", "experts", "in_projection", "out_projection")


@dataclass(frozen=True)
class Tower:
    """A tower in a plan.

    Args:
        name: `language`, `vision`, `audio` or `projector`.
        layers: the number of its linear layers, with the fused matrices of experts.
        adapted: the number of its adapted sites.
        parameters: the number of its parameters; one that several towers hold counts in the first.
        trains: the number of its adapters' trained parameters; tensors that several layers share count once.
    """

    name: str
    layers: int
    adapted: int
    parameters: int
    trains: int


def tower_roots(scan: Scan) -> dict[str, str]:
    """path -> tower, of the outermost module of each tower; empty for a model of one part."""
    config: Any = getattr(scan.model, "config", None)
    kinds = {
        type(part): tower for field, tower in _OF_CONFIG.items() if (part := getattr(config, field, None)) is not None
    }
    found: dict[str, str] = {}
    for path, m in scan.modules.items():
        tower = kinds.get(type(getattr(m.module, "config", None)))
        if path and tower is not None and not any(path.startswith(f"{root}.") for root in found):
            found[path] = tower
    return found if len(set(found.values())) > 1 else {}


def tower_of(path: str, roots: Mapping[str, str], heads: Iterable[str]) -> str:
    """The tower of a module; empty for an output head, or in a model without towers."""
    if not roots or path in heads:
        return ""
    root = next((root for root in roots if path == root or path.startswith(f"{root}.")), None)
    if root is None or (roots[root] != "language" and _MERGER.fullmatch(path.removeprefix(root).lstrip("."))):
        return PROJECTOR
    return roots[root]


def towers(scan: Scan, sites: Sequence[AdaptedSite]) -> tuple[Tower, ...]:
    """The towers of a model under a plan; none for a model of one part."""
    roots = tower_roots(scan)
    if not roots:
        return ()
    layers, adapted, parameters, trains = (dict.fromkeys(TOWERS, 0) for _ in range(4))
    for path, m in scan.modules.items():
        if m.kind in LINEAR_KINDS and (tower := tower_of(path, roots, scan.heads)):
            layers[tower] += 1
    for name, parameter in scan.parameters.items():
        if tower := tower_of(name.rpartition(".")[0], roots, scan.heads):
            parameters[tower] += parameter.numel()
    for site in sites:
        if tower := tower_of(site.site.name, roots, scan.heads):
            adapted[tower] += 1
    for site in unique_tensor_sets(sites):
        if tower := tower_of(site.site.name, roots, scan.heads):
            trains[tower] += site.trainable
    return tuple(
        Tower(name, layers[name], adapted[name], parameters[name], trains[name]) for name in TOWERS if parameters[name]
    )
