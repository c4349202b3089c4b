"""What one block of a decoder keeps for the backward pass, and what that pass holds on top of it, tensor by tensor.

A tensor that several operations keep is counted once: it has one name here. T is the number of tokens, w the bytes of a
number of the hidden states, e those of what a product gives; the other letters are those of `architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorary.footprint import in_groups
from lorary.footprint.adapters import Held
from lorary.footprint.architecture import Architecture
from lorary.footprint.workload import Workload


@dataclass
class Block:
    """What a block keeps, by tensor, and how full it gets on the way back.

    Args:
        kept: name -> bytes.
        moments: bytes held at moments of the backward pass, beyond what all blocks keep: below zero where more has
            been given back than taken.
    """

    kept: dict[str, int] = field(default_factory=dict)
    moments: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(self.kept.values())

    @property
    def takes(self) -> int:
        """The fullest moment."""
        return max([0, *self.moments])


@dataclass(frozen=True)
class Groups:
    """The layers of a block by what they read: `qkv` the first norm, `o` the scores' average, `up` the second norm
    (gate and up), `down` their product."""

    qkv: Held
    o: Held
    up: Held
    down: Held
    norms_train: bool = False


def block(a: Architecture, work: Workload, groups: Groups, starts: str = "") -> Block:
    """The account of one block.

    Args:
        a: the sizes.
        work: the micro-batch.
        groups: what its layers hold.
        starts: the group that is the first of the model to learn: nothing before it is kept. Empty: another block's.
    """
    made = Block()
    T, w = work.tokens, work.w
    order = ("qkv", "o", "up", "down")
    idle = order[: order.index(starts)] if starts else ()
    if not starts:
        _norm(made, a, work, "input", groups.norms_train)
    if "qkv" not in idle:
        _projections(made, a, work, groups.qkv)
        _attention(made, a, work)
    if "o" not in idle:
        _output(made, a, work, "attended" if a.attention != "eager" else "averaged", T * a.Q * work.e, groups.o)
        if a.dropout[1]:
            made.kept["mask of attention's output"] = T * a.H * w
        if a.four_norms:
            _norm(made, a, work, "attention's output", groups.norms_train)
        _norm(made, a, work, "middle", groups.norms_train)
    if "up" not in idle:
        _mlp(made, a, work, groups.up)
    _output(made, a, work, "product", T * a.M * work.e, groups.down)
    if a.dropout[1]:
        made.kept["mask of the MLP's output"] = T * a.H * w
    if a.four_norms:
        _norm(made, a, work, "MLP's output", groups.norms_train)
    _back(made, a, work, groups)
    return made


def _norm(made: Block, a: Architecture, work: Workload, of: str, trains: bool) -> None:
    T, H = work.tokens, a.H
    if not a.gated:  # a layer norm is one operation
        made.kept[of] = T * H * work.w
        made.kept[f"mean and deviation of {of}"] = 8 * T
        return
    made.kept[of if work.w == 4 else f"{of} in 32 bits"] = 4 * T * H
    made.kept[f"root of {of}"] = 4 * T
    if trains:
        made.kept[f"{of} over its root"] = T * H * work.w


def _projections(made: Block, a: Architecture, work: Workload, group: Held) -> None:
    T, e = work.tokens, work.e
    if group.input:
        made.kept["input, normalised"] = T * a.H * work.w
    made.kept["adapters of q, k, v"] = group.extra
    names = [("fused q, k, v", a.Q + 2 * a.K)] if a.fused else [("q", a.Q), ("k", a.K), ("v", a.K)]
    for (name, width), keeps in zip(names, group.outputs, strict=True):
        if keeps:
            made.kept[name] = T * width * e
    if a.head_norm:
        for name, width in (("q", a.Q), ("k", a.K)):
            made.kept[name if e == 4 else f"{name} in 32 bits"] = 4 * T * width
            made.kept[f"roots of {name}"] = 4 * T * width // a.head_width


def _attention(made: Block, a: Architecture, work: Workload) -> None:
    T, S, e = work.tokens, work.length, work.e
    repeated = in_groups.repeats(a) if a.groups else a.K < a.Q and (work.padding or a.attention == "eager")
    if a.groups and work.padding:  # what was gathered is kept instead
        made.kept |= in_groups.kept(a, work)
        return
    rotated = "q, k, v" if not a.gated else "rotated"
    if not a.gated:
        made.kept["fused q, k, v"] = T * (a.Q + 2 * a.K) * e
    else:
        made.kept[f"{rotated} q"] = T * a.Q * e
        made.kept[f"{rotated} k"] = T * (a.Q if repeated else a.K) * e
        if a.fused and not repeated:  # v is a part of what the one weight gave, and keeps all of it
            made.kept["fused q, k, v"] = T * (a.Q + 2 * a.K) * e
        else:
            made.kept["v, repeated" if repeated else "v"] = T * (a.Q if repeated else a.K) * e
    scores = a.n * S * T
    if a.attention == "eager":
        made.kept["scores"] = 4 * scores
        if e < 4:
            made.kept["scores in 16 bits"] = e * scores
        if a.dropout[0]:
            made.kept["scores' mask and what it left"] = 2 * e * scores
        return
    if a.groups:
        made.kept |= in_groups.kept(a, work)
        return
    made.kept["attended"] = T * a.Q * e
    made.kept["sums of exponentials"] = 4 * T * a.n
    if work.padding:
        made.kept["mask"] = T * S * e


def _output(made: Block, a: Architecture, work: Workload, name: str, size: int, group: Held) -> None:
    """The layer whose output is added to the hidden states, of an input of this name and size."""
    if group.input:
        made.kept[name] = size
    of = "MLP" if name == "product" else "attention"
    made.kept[f"adapters after the {of}"] = group.extra
    if group.outputs[0]:
        made.kept[f"{of}'s output"] = work.tokens * a.H * work.e


def _mlp(made: Block, a: Architecture, work: Workload, group: Held) -> None:
    T, e = work.tokens, work.e
    if group.input:
        made.kept["middle, normalised"] = T * a.H * work.w
    made.kept["adapters of gate and up"] = group.extra
    if not a.gated:  # GPT-2's activation is made of seven operations, which keep four tensors
        made.kept["up and what its activation is made of"] = 4 * T * a.M * e
        return
    if a.fused:
        made.kept["gate and up"] = 2 * T * a.M * e
    else:
        made.kept["gate"] = made.kept["up"] = T * a.M * e
    made.kept["activated"] = T * a.M * e


def norm_takes(a: Architecture, work: Workload) -> int:
    """What the backward pass of a norm holds, its output's gradient aside."""
    numbers = work.tokens * a.H
    return numbers * ((12 if work.w == 4 else 16) if a.gated else work.w)


_AFTER = ("MLP's output", "MLP's output in 32 bits", "root of MLP's output", "mask of the MLP's output")
_PRODUCT = ("product", "adapters after the MLP")
_WIDE = ("gate", "up", "gate and up", "activated", "up and what its activation is made of")
_BEFORE = ("middle, normalised", "adapters of gate and up", "middle", "middle in 32 bits", "root of middle")


def _back(made: Block, a: Architecture, work: Workload, groups: Groups) -> None:
    """The moments at which the backward pass is fullest, from the block's end on."""
    T, e = work.tokens, work.e
    stream, wide = T * a.H * work.w, T * a.M * e

    def back(*names: str) -> int:
        return sum(made.kept.get(name, 0) for name in names)

    if a.four_norms:
        made.moments.append(stream + norm_takes(a, work))
    given = back(*_AFTER) if a.four_norms else back("mask of the MLP's output")
    made.moments.append(stream + groups.down.takes - given)
    given += back(*_PRODUCT) + (0 if a.four_norms else back("MLP's output"))
    made.moments.append(stream + 3 * wide - given)  # gate times up, or the activation
    given += back(*_WIDE)
    made.moments.append(stream + (2 if a.gated else 1) * wide + groups.up.takes - given)
    given += back(*_BEFORE)
    if a.attention == "eager":
        scores = a.n * work.length * T
        made.moments.append(stream + 2 * T * a.Q * e + scores * (e + (8 if e < 4 else 4)) - given)
