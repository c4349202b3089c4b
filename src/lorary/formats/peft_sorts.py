"""The sorts of adapter that PEFT has: which of them an adapter is, and what each says beside what all of them say."""

from __future__ import annotations

from typing import Any

import torch

from lorary.adapter import Adapter
from lorary.errors import Problem
from lorary.formats.banks import Banks
from lorary.methods.adalora import ByStartRank, Orthogonal, Spectral
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.dora import Direction
from lorary.methods.lora import Add, LowRank
from lorary.methods.o_lora import Tasks
from lorary.methods.vera import Projections, Vectors
from lorary.placed import Placed

KINDS = {"VeRA": ("linear", "transposed"), "AdaLoRA": ("linear", "transposed", "conv2d")}  # a LoRA has all of them
NAMES = {"VeRA": "whole linear layers", "AdaLoRA": "whole linear layers and two-dimensional convolutions"}
_SORTS: dict[tuple[type, type], str] = {
    (LowRank, Add): "LoRA",
    (Tasks, Add): "LoRA",
    (LowRank, Direction): "DoRA",
    (Spectral, Add): "AdaLoRA",
    (Vectors, Add): "VeRA",
}


def sort_of(adapter: Adapter) -> str:
    """What PEFT has with these very tensors: `LoRA`, `DoRA`, `AdaLoRA` or `VeRA`; empty for none of them."""
    sorts = {_SORTS.get((type(p.delta), type(p.method.join)), "") for p in adapter.placed}
    if len(sorts) != 1 or any(p.starts or _two_precisions(adapter, p) for p in adapter.placed):
        return ""
    return sorts.pop()


def _two_precisions(adapter: Adapter, p: Placed) -> bool:
    """Whether what earlier tasks have learnt cannot be in one tensor with the new task's."""
    return bool(p.delta.given) and len({t.dtype for t in adapter.tensors[p.site.name].values()}) > 1


def sort_obstacles(adapter: Adapter, sort: str, shared: Banks) -> list[Problem]:
    """Why an adapter of these tensors is none that PEFT has."""
    problems = []
    for p in adapter.placed:
        if p.site.kind not in KINDS.get(sort, (p.site.kind,)) or (sort in KINDS and p.site.parts):
            problems.append(Problem(p.site.name, f"PEFT's {sort} adapts {NAMES[sort]} only"))
    if sort == "VeRA":
        if len({p.r for p in adapter.placed}) > 1 or any(p.scale != 1 for p in adapter.placed):
            problems.append(Problem("method", "PEFT's VeRA has one rank for all layers, and no scale"))
        if not shared.kept and any(bank.dtype != torch.float32 for bank in shared.whole.values()):
            problems.append(Problem("method", "PEFT draws VeRA's projections in 32 bits"))
    if sort == "AdaLoRA":
        if len({(p.r, p.method.scale) for p in adapter.placed}) > 1:
            what = "PEFT's AdaLoRA has one rank at the start, and one alpha, for all layers"
            problems.append(Problem("method", what))
        for name in _masks(adapter):
            if "default" in name:
                what = "PEFT's AdaLoRA takes `default` within a path for the name that it gives an adapter"
                problems.append(Problem(name.rpartition(".")[0], what))
        if any(not isinstance(p.method.scale, ByStartRank) for p in adapter.placed):
            problems.append(Problem("method", "PEFT's AdaLoRA has alpha / (r + 1e-5) for its scale, and no other"))
    return problems


def vera_words(adapter: Adapter, shared: Banks) -> dict[str, Any]:
    """What the configuration of a VeRA says beside what all of them say."""
    init = adapter.method.init
    start = init if isinstance(init, Projections) else Projections()
    return {
        "peft_type": "VERA",
        "r": adapter.placed[0].r,
        "vera_dropout": adapter.method.dropout,
        "d_initial": start.d,
        "projection_prng_key": start.seed,
        "save_projection": shared.kept,
        "init_weights": True,
    }


def adalora_words(adapter: Adapter) -> dict[str, Any]:
    """What the configuration of an AdaLoRA says beside what all of them say.

    A run's length is no part of an adapter: `total_step` is the shortest that PEFT accepts with these phases, and a
    phase that is a share of the run is said to take no step. PEFT reads how many directions a layer has left from the
    length of its mask; which of those at the start they were is not known here.
    """
    r = adapter.placed[0].r
    budget = next((rule for rule in adapter.method.rules if isinstance(rule, RankBudget)), RankBudget(r))
    penalty = next((rule for rule in adapter.method.rules if isinstance(rule, Orthogonal)), Orthogonal(0.0))
    first, last = (int(said) if said >= 1 else 0 for said in (budget.start_at, budget.final))
    return {
        "peft_type": "ADALORA",
        "r": 8,  # PEFT's default, which its AdaLoRA does not look at
        "init_r": r,
        "target_r": budget.target,
        "tinit": first,
        "tfinal": last,
        "total_step": first + last + 1,
        "deltaT": budget.every,
        "beta1": budget.beta1,
        "beta2": budget.beta2,
        "orth_reg_weight": penalty.weight,
        "lora_alpha": adapter.placed[0].alpha,
        "lora_dropout": adapter.method.dropout,
        "init_lora_weights": True,
        "rank_pattern": _masks(adapter) or None,
    }


def _masks(adapter: Adapter) -> dict[str, list[bool]]:
    left = {p.site.name: p.shapes["E"][0] for p in adapter.placed}
    masks = {f"{p.site.name}.lora_E": [i < left[p.site.name] for i in range(p.r)] for p in adapter.placed}
    return dict(sorted((name, mask) for name, mask in masks.items() if not all(mask)))
