"""Which layers of a plan stand where in a block."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorary.footprint.adapters import Held, Layer
from lorary.footprint.architecture import Architecture
from lorary.footprint.block import Groups
from lorary.footprint.known import holds
from lorary.footprint.workload import Workload
from lorary.plans import Plan

_PLACES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "c_attn": "qkv",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "c_fc": "up",
    "down_proj": "down",
}
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)")
_SEVEN = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up"), "down": ("down",)}
_FUSED = {"qkv": ("qkv",), "o": ("o",), "up": ("gate_up",), "down": ("down",)}
_GPT2 = {"qkv": ("qkv",), "o": ("o",), "up": ("up",), "down": ("down",)}


def place(name: str) -> tuple[int, str] | None:
    """(block, place in it) of a layer by its path; None for one outside of the blocks."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    path, _, last = match[2].rpartition(".")
    if last == "c_proj":
        return int(match[1]), "o" if path == "attn" else "down"
    return (int(match[1]), _PLACES[last]) if last in _PLACES else None


@dataclass(frozen=True)
class Laid:
    """A plan laid over the blocks of a model.

    Args:
        groups: what the groups of every block hold.
        first: (block, group) of the first layer that learns: before it there is no gradient, and nothing is kept.
        strangers: adapted layers that stand in no block.
        ends: base parameters outside of the blocks that train in full: "embedding", "head".
    """

    groups: tuple[Groups, ...]
    first: tuple[int, str]
    strangers: tuple[str, ...] = ()
    ends: frozenset[str] = frozenset()


def laid(a: Architecture, plan: Plan, work: Workload) -> Laid:
    """What the layers of every block hold."""
    layers: dict[tuple[int, str], dict[str, Any]] = {}
    strangers = []
    for p in plan.placed:
        where = place(p.site.name)
        if where is None:
            strangers.append(p.site.name)
        else:
            layers.setdefault(where, {})["placed"] = _nameless(p)
    for name in plan.packed:
        if where := place(name):
            layers.setdefault(where, {})["storage"] = plan.method.storage
    norms, ends = set(), set()
    for f in plan.full:
        where, match = place(f.name.rpartition(".")[0]), _BLOCK.fullmatch(f.name)
        if not f.trains:
            continue
        if where and f.name.endswith(".weight"):
            layers.setdefault(where, {})["full"] = True
        elif match and ("norm" in f.name or ".ln_" in f.name):
            norms.add(int(match[1]))
        elif match is None and len(f.shape) == 2:
            ends |= {"head"} if f.name.startswith("lm_head") else {"embedding", "head"} if a.tied else {"embedding"}
    names = _FUSED if a.model_type == "phi3" else _SEVEN if a.gated else _GPT2
    learning = {where for where, facts in layers.items() if "placed" in facts or "full" in facts}
    order = [(i, group) for i in range(a.L) for group in names]
    starts = [(i, g) for i, g in order if any((i, place) in learning for place in names[g])]
    first = (-1, "qkv") if "embedding" in ends else starts[0] if starts else (a.L, "qkv")
    groups = tuple(
        Groups(**{g: _held(a, work, layers, i, g, places) for g, places in names.items()}, norms_train=i in norms)
        for i in range(a.L)
    )
    return Laid(groups, first, tuple(strangers), frozenset(ends))


def _held(
    a: Architecture,
    work: Workload,
    layers: Mapping[tuple[int, str], Mapping[str, Any]],
    index: int,
    group: str,
    places: tuple[str, ...],
) -> Held:
    outs = {"q": a.Q, "k": a.K, "v": a.K, "qkv": a.Q + 2 * a.K, "o": a.H}
    outs |= {"gate": a.M, "up": a.M, "gate_up": 2 * a.M, "down": a.H}
    inp = {"qkv": a.H, "o": a.Q, "up": a.H, "down": a.M}[group]
    of = tuple(Layer(outs[place], **layers.get((index, place), {})) for place in places)
    return holds(of, inp, work.tokens, work.computes)


def _nameless(placed: Any) -> Any:
    """The same wherever it stands, so that equal blocks are counted once."""
    return dataclasses.replace(placed, site=dataclasses.replace(placed.site, name="layer"), share="")
