"""PEFT's adapters of nn.MultiheadAttention: both projections, with one rank and one alpha, under the module's name.

<attention>.lora_A.weight                       (R, width)   in_proj_weight
<attention>.lora_B.weight                       (3 width, R)
<attention>.base_layer.out_proj.lora_A.weight   (R, width)   out_proj
<attention>.base_layer.out_proj.lora_B.weight   (width, R)

PEFT merges both for every forward pass, and out_proj's update twice: by hand, and by the layer's own `merge`
(`MultiheadAttention.merge` in its `tuners/lora/layer.py`, in releases 0.14 to 0.21). The function that it trained, and
computes, has W + 2 s B A there. So B is doubled when it is read and halved when it is written, which are both exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.layers.multihead_attention import FUSED, OUT_PROJECTION
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import PROJECTIONS, Site

_INSIDE = ".base_layer."
OUTSIDE = f"{_INSIDE}{OUT_PROJECTION}"
"""The end of the output projection's path, behind that of the attention."""
_MARK = f"{OUTSIDE}.lora_"  # no layer but an attention has it in the names of its tensors
_BOTH = "PEFT adapts in_proj_weight and out_proj of nn.MultiheadAttention together"


def attention_of(site: Site) -> str:
    """The path of the attention that a projection belongs to; of any other site its own path."""
    return site.name.rpartition(".")[0] if site.kind in PROJECTIONS else site.name


def attentions_in(names: Iterable[str]) -> frozenset[str]:
    """The paths of the attentions among short names of PEFT's tensors."""
    return frozenset(name.partition(_MARK)[0] for name in names if _MARK in name)


def from_file(names: Mapping[str, str], attentions: Iterable[str]) -> dict[str, str]:
    """The keys of a table by short names as PEFT writes them, with the projections' own names."""
    found = dict(names)
    for path in attentions:
        for name in [name for name in found if name.startswith((f"{path}.lora_", f"{path}{_INSIDE}"))]:
            rest = name.removeprefix(f"{path}.")
            inner = rest.removeprefix("base_layer.") if rest.startswith("base_layer.") else f"{FUSED}.{rest}"
            found[f"{path}.{inner}"] = found.pop(name)
    return found


def to_file(tensors: Mapping[str, Tensor], sites: Iterable[Site]) -> dict[str, Tensor]:
    """Tensors by their names in PEFT's file, for names of projections."""
    found = dict(tensors)
    for path in {attention_of(site) for site in sites if site.kind in PROJECTIONS}:
        for name in [name for name in found if name.startswith(f"{path}.")]:
            rest = name.removeprefix(f"{path}.")
            inner = rest.removeprefix(f"{FUSED}.")
            found[f"{path}.{inner}" if inner != rest else f"{path}{_INSIDE}{rest}"] = found.pop(name)
    return found


def projection(site: Site, attentions: Iterable[str]) -> Site:
    """A linear site with the kind of an attention's projection, if it is one."""
    owner, _, last = site.name.rpartition(".")
    kinds = {FUSED: "in_projection", OUT_PROJECTION: "out_projection"}
    return dataclasses.replace(site, kind=kinds[last]) if owner in attentions and last in kinds else site


def up_factor_here(site: Site, B: Tensor) -> Tensor:
    """B of a site as it is here, for that in PEFT's file."""
    return 2 * B if site.kind == "out_projection" else B


def up_factor_in_file(site: Site, B: Tensor) -> Tensor:
    """B of a site as it is in PEFT's file."""
    return B / 2 if site.kind == "out_projection" else B


def notes(attentions: Iterable[str]) -> list[str]:
    """What reading them has changed."""
    what = "PEFT adds the update of nn.MultiheadAttention's out_proj twice: B of it is doubled here"
    return [what] if any(attentions) else []


def why_not_in_peft(site: Site) -> str:
    """Why PEFT does not adapt this projection; empty if it can."""
    owner, _, last = site.name.rpartition(".")
    if not owner:
        return "is of an attention that is the whole model, and PEFT adapts modules inside of a model"
    separate = site.kind == "in_projection" and last != FUSED
    return "is of an attention whose keys or values have another width, which PEFT does not adapt" if separate else ""


def unpaired(sites: Iterable[AdaptedSite]) -> list[Diagnostic]:
    """The projections whose partner is not adapted."""
    there = [adapted for adapted in sites if not why_not_in_peft(adapted.site)]
    alone = [found[0].site.name for found in _by_attention(there).values() if len(found) == 1]
    fix = "adapt both, or merge the adapter and save the model"
    return [Diagnostic(name, f"is adapted alone, and {_BOTH}", fix) for name in alone]


def differ(sizes: Mapping[str, tuple[int, float]], sites: Iterable[AdaptedSite]) -> bool:
    """Whether the projections of an attention differ in rank or alpha, given (rank, alpha) by site."""
    return any(len({sizes[a.site.name] for a in found}) > 1 for found in _by_attention(sites).values())


def with_equal_ranks(
    factors: Mapping[str, tuple[Tensor, Tensor]], sites: Iterable[AdaptedSite]
) -> dict[str, tuple[Tensor, Tensor]]:
    """site -> (B [out, R], A [R, in]), zeros appended where a projection's rank is lower than its partner's."""
    found = dict(factors)
    for both in _by_attention(sites).values():
        names = [adapted.site.name for adapted in both]
        most = max(found[name][1].shape[0] for name in names)
        for name in names:
            B, A = found[name]
            more = most - A.shape[0]
            found[name] = F.pad(B, (0, more)), F.pad(A, (0, 0, 0, more))
    return found


def _by_attention(sites: Iterable[AdaptedSite]) -> dict[str, list[AdaptedSite]]:
    """The path of an attention -> its projections among these sites."""
    found: dict[str, list[AdaptedSite]] = {}
    for adapted in sites:
        if adapted.site.kind in PROJECTIONS:
            found.setdefault(attention_of(adapted.site), []).append(adapted)
    return found
