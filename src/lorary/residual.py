"""Residual: the base gives up what a delta starts at (PiSSA, OLoRA), and gets it back.

Where s B A is not zero at the start, the base becomes W - s B0 A0. What it was is kept, so that detaching and merging
stay exact; B0 and A0 are kept as well, so that the adapter can always be had on the unmodified base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted
from lorary.errors import Problem, StateError
from lorary.state import Attached, attached, base_parameter


def give_up(model: nn.Module, layer: Adapted) -> None:
    """Where the delta does not start at zero, the base becomes W - s B A of its start; what it was is kept.

    A weight that other layers hold as well stays theirs, and this one gets its own.
    """
    factors = layer.start_factors()
    weight = cast(nn.Parameter, layer.weight)
    if factors is None or weight.is_meta:
        return
    state, kind = cast(Attached, attached(model)), layer.kind
    exact = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        B, A = (factor.to(weight.device, exact) for factor in factors)
        rest = torch.addmm(kind.matrix(layer.base).to(exact), B, A, alpha=-layer.scale)
        rest = kind.weight(layer.base, rest).to(weight.dtype)
        if sum(held is weight for m in model.modules() for held in m._parameters.values()) > 1:
            state.moved[layer.site.name] = weight
            layer.base.weight = nn.Parameter(rest, requires_grad=False)
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
                model.config.tie_word_embeddings, state.untied = False, True  # type: ignore[union-attr]
        else:
            state.moved[layer.site.name] = weight.detach().to("cpu", copy=True)
            weight.copy_(rest)


def restart(model: nn.Module, layer: Adapted, tensors: Mapping[str, Tensor]) -> None:
    """Let what never trains in a layer be what a file says: where its delta started, and what all layers share.

    A start that was found again on another machine differs in its last bits, and with it what the base gave up.

    Raises:
        StateError: the start differs, and the base is sharded already, so that it cannot give up another part.
    """
    if layer.shared is not None:
        layer.shared.load({role: tensors[role] for role in layer.corners})
    if all(torch.equal(t, tensors[role].to(t)) for role, t in layer.start.items()):
        return
    if hasattr(layer.weight, "full_tensor"):
        what = "began at other tensors here, and its weight is sharded already"
        raise StateError("cannot go on from this adapter:", [Problem(layer.site.name, what, "load it before sharding")])
    take_back(layer, cast(Attached, attached(model)).moved[layer.site.name])
    layer.load({role: tensors[role] for role in layer.start})
    give_up(model, layer)


def pristine(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer as it was before it gave up a part of it, in the layer's own layout."""
    moved = cast(Attached, attached(model)).moved if attached(model) is not None else {}
    before = moved.get(name, base_parameter(model, f"{name}.weight"))
    if isinstance(before, nn.Parameter):  # of other layers, too: one of them may have given up a part for itself
        for other, values in moved.items():
            if not isinstance(values, nn.Parameter) and base_parameter(model, f"{other}.weight") is before:
                return values
    return before.detach()


def take_back(layer: Adapted, before: Tensor) -> None:
    """Give a layer the weight that it had before it gave up a part of it."""
    if isinstance(before, nn.Parameter):
        layer.base.weight = before
    else:
        with torch.no_grad():
            cast(nn.Parameter, layer.weight).copy_(before)
