"""Attached: what a model remembers while a method is attached to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted
from lorary.biases import Room
from lorary.contexts import Reading
from lorary.errors import Problem, StateError
from lorary.fingerprint import STATE, Fingerprint
from lorary.placed import Placed
from lorary.record import Method


class Merged(NamedTuple):
    """What a merge replaced at a site: the weight and bias of the base, the adapted layer; and the layer there now,
    with the precision that the merge gave it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    layer: Adapted
    plain: nn.Module
    dtype: torch.dtype


@dataclass
class Attached:
    """What a model remembers while adapters are attached, so that everything can be put back.

    Args:
        method: the method.
        placed: the adapted sites.
        full: base parameters that train in full -> their values before training.
        trained: the names of parameters that required gradients before.
        paths: site -> every path of its layer, more than one for a shared layer.
        moved: site -> what its weight was before the base gave up a part of it: the values, on the CPU, or the
            parameter itself where others hold it too and the layer got one of its own.
        untied: whether the model's configuration says that its embeddings are no longer tied, because one of them
            has got a weight of its own: else the next `tie_weights` would take it away again.
        fingerprint: of the base, taken before anything changed or was sharded.
        merged: once merged, site -> what the merge replaced, and by what.
        tied: the parameters that a merge untied from each other: module, name, and what it held there before.
        room: what a merge did to the model so that it may have biases which it had not.
        off: how many `disabled` blocks the model is in.
        reading: what the method's context did to the model.
    """

    method: Method
    placed: tuple[Placed, ...]
    full: dict[str, Tensor]
    trained: frozenset[str]
    paths: dict[str, list[str]]
    fingerprint: Fingerprint
    moved: dict[str, Tensor] = field(default_factory=dict)
    untied: bool = False
    merged: dict[str, Merged] | None = None
    tied: list[tuple[nn.Module, str, nn.Parameter]] | None = None
    room: Room = field(default_factory=Room)
    off: int = 0
    reading: Reading | None = None


def attached(model: nn.Module) -> Attached | None:
    """What is attached to a model, or None."""
    return cast("Attached | None", getattr(model, STATE, None))


def require(model: nn.Module, verb: str) -> Attached:
    """What is attached to a model.

    Raises:
        StateError: nothing is, it has been merged, or it is disabled for now.
    """
    state = attached(model)
    if state is None:
        raise StateError(
            f"there is nothing to {verb}:", [Problem("model", "no adapter is attached", "attach one first")]
        )
    if state.merged is not None:
        raise StateError(f"cannot {verb}:", [Problem("model", "the adapter is merged", "unmerge it first")])
    if state.off and verb != "disable":
        what, fix = "the adapter is disabled, and the model has the base's values", "leave the `disabled` block first"
        raise StateError(f"cannot {verb}:", [Problem("model", what, fix)])
    return state


def base_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A base parameter by its path in the plain model, wherever an adapter has moved it to."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return cast(nn.Parameter, getattr(module, last))
