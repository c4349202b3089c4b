"""A whole training step: all blocks, the ends of the model, head and loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorary.footprint import in_groups
from lorary.footprint.architecture import Architecture
from lorary.footprint.block import Block, block, norm_takes
from lorary.footprint.chunks import chunk
from lorary.footprint.sites import laid
from lorary.footprint.workload import Workload
from lorary.plans import Plan


@dataclass(frozen=True)
class Activations:
    """What a training step holds beside parameters, their gradients and the optimizer's state, in bytes.

    Args:
        kept: alive when the forward pass has reached the last hidden states: kept for the backward pass.
        loss: what head and loss hold on top of that at their fullest moment.
        working: what the backward pass through the model holds on top of that at its fullest moment.
    """

    kept: int
    loss: int
    working: int


def activations(a: Architecture, plan: Plan, work: Workload) -> Activations | None:
    """What a step of a planned model holds; None where the plan adapts layers that no formula knows."""
    if plan.method.context is not None and plan.method.context.divides:
        a = replace(a, attention="sdpa", groups=plan.method.context.divides)
    over = laid(a, plan, work)
    if over.strangers:
        return None
    index, group = over.first
    starts = [group if i == index else "" for i in range(a.L)]
    made = [block(a, work, g, s) for g, s in zip(over.groups, starts, strict=True)][max(0, index) :]
    casts = _casts(a, plan, work)
    if work.checkpointing:
        kept = work.tokens * a.H * work.w * len(made)
        kept += _shared(a, work)
    else:
        kept = sum(b.total for b in made) + casts * len(made)
    kept += in_groups.places(a, work) if a.groups else 0
    ends = _ends(a, work, any(g.norms_train for g in over.groups))
    on_loss, through = _loss(a, work, over.ends)
    return Activations(kept + sum(ends), on_loss, through + _working(a, work, made, ends[0], casts))


def _ends(a: Architecture, work: Workload, norms_train: bool) -> tuple[int, int]:
    """(what is given back before the blocks' turn comes, what stays): last norm and states; the rotation's angles."""
    T, H = work.tokens, a.H
    norm = 4 * T * H + 4 * T if a.gated else T * H * work.w + 8 * T
    norm += T * H * work.w if norms_train and a.gated else 0
    return norm + T * H * work.w, 2 * work.length * a.head_width * work.w if a.gated else 0


def _shared(a: Architecture, work: Workload) -> int:
    """What all checkpoints keep in common: a mask, and GPT-2's embeddings before and after dropout."""
    if a.groups:  # which have places instead of masks
        return 0
    mask = work.w if a.attention == "eager" else 1 if work.padding else 0
    embeddings = 0 if a.gated else 2 if a.dropout[1] else 1
    return work.tokens * (work.length * mask + embeddings * a.H * work.w)


def _loss(a: Architecture, work: Workload, ends: frozenset[str]) -> tuple[int, int]:
    """(what head and loss hold, what of it stays through the backward pass): a trained head's gradient, if it is tied.

    Of the labelled rows a chunk at a time: logits, their softmax, and two more of that size for what is reported.
    """
    rows = max(1, round(work.labelled * work.batch * (work.length - 1)))
    gradient = a.V * a.H * work.w if "head" in ends else 0
    through = gradient if a.tied else 0
    logits = -(-rows // -(-rows // chunk(a.V))) * a.V
    cast = 2 * a.V * a.H if work.autocast else 0
    made = (18 if work.autocast else 16) * logits  # autocast's own, in 16 bits, are there as well
    return rows * a.H * work.w + max(made, 4 * logits + gradient) + cast, through


def _casts(a: Architecture, plan: Plan, work: Workload) -> int:
    """The 16-bit copies of a block's frozen weights that autocast makes and autograd keeps; of packed ones there are
    none."""
    if not work.autocast or plan.packed:
        return 0
    attention = a.H * (a.Q + 2 * a.K) + a.Q * a.H
    return 2 * (attention + (3 if a.gated else 2) * a.H * a.M)


def _working(a: Architecture, work: Workload, made: list[Block], given: int, casts: int) -> int:
    """The fullest moment of the backward pass: in the last norm, or in the last block, made again if need be."""
    T, H, w = work.tokens, a.H, work.w
    last = T * H * w + norm_takes(a, work)
    if not work.checkpointing:
        return max(last, (made[-1].takes if made else 0) - given)
    again = [last]
    for later, b in enumerate(reversed(made)):  # the checkpoints of later blocks have been given back by then
        own = b.total - (b.kept.get("input", 0) if w == 4 or not a.gated else 0)
        again.append(own + casts + b.takes - given - later * T * H * w)
    return max(again)
