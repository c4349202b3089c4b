"""Residual: the base gives up what a delta starts at (PiSSA, OLoRA), and gets it back.

Where s B A is not zero at the start, the base becomes W - s B0 A0. What it was is kept, so that detaching and merging
stay exact; B0 and A0 are kept as well, so that the adapter can always be had on the unmodified base.

A base that is packed keeps the packed rest alone (QPiSSA): what it was is had again from it and from B0 and A0, up to
what packing has lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError, StateError
from lorary.layers.adapted import Adapted
from lorary.layers.dtensor import is_sharded
from lorary.layers.kinds import kind_of
from lorary.layers.quantized_weight import is_quantized, weight
from lorary.model.quantize import already_quantized, dequantized_layer
from lorary.model.state import AttachedState, base_parameter, state_of


def initialise_layer(layer: Adapted, seed: int, *, packs: bool) -> None:
    """Fill a layer's tensors; where its base will be packed and the init says so, again at what packing loses."""
    layer.initialise(seed)
    if packs and layer.start:
        W = _exact(layer)
        for _ in range(layer.init.rounds - 1):
            held = layer.kind.matrix(layer.method.storage.quantize(layer.base, _rest(layer)))
            layer.initialise(seed, W - held.to(W.dtype))


def finalise_start(model: nn.Module, layer: Adapted, *, packs: bool) -> None:
    """Let the base give up what the delta starts at, and pack it."""
    if not packs:
        subtract_start(model, layer)
    elif not layer.weight.is_meta:
        rest = _rest(layer) if layer.start else None
        _check(layer, rest)
        _keep(layer, layer.method.storage.quantize(layer.base, rest))
    else:
        _keep(layer, layer.method.storage.quantize(layer.base))


def _keep(layer: Adapted, base: nn.Module) -> None:
    """Let a layer have another base, which may be of another kind: GPT-2's layer is packed into a linear one."""
    layer.base = base
    layer.site = dataclasses.replace(layer.site, kind=cast(str, kind_of(base)))


def _exact(layer: Adapted) -> Tensor:
    """The base's matrix [out, inp], in at least 32 bits."""
    W = layer.kind.matrix(layer.base).detach()
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _rest(layer: Adapted, sign: int = -1) -> Tensor:
    """W - s B0 A0 [out, inp] of the base's W, in at least 32 bits; with sign=1 what W was before."""
    W = _exact(layer)
    B, A = (factor.to(W) for factor in cast("tuple[Tensor, Tensor]", layer.start_factors()))
    return torch.addmm(W, B, A, alpha=sign * layer.scale)


def _check(layer: Adapted, rest: Tensor | None) -> None:
    if rest is not None and not rest.isfinite().all():
        what = f"what is left of its weight, W - s B A with s = {layer.scale:g}, is not finite in {rest.dtype}"
        raise PlanError("cannot attach:", [Diagnostic(layer.site.name, what, "use a smaller alpha, or check the base")])


def subtract_start(model: nn.Module, layer: Adapted) -> None:
    """Where the delta does not start at zero, the base becomes W - s B A of its start; what it was is kept.

    A weight that other layers hold as well stays theirs, and this one gets its own.
    """
    weight = cast(nn.Parameter, layer.weight)
    if not layer.start or weight.is_meta:
        return
    state = cast(AttachedState, state_of(model))
    with torch.no_grad():
        rest = layer.kind.weight(layer.base, _rest(layer)).to(weight.dtype)
        _check(layer, rest)
        if not _alone(model, weight, state):
            state.replaced_weights[layer.site.name] = weight
            layer.base.weight = nn.Parameter(rest, requires_grad=False)
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
                model.config.tie_word_embeddings, state.untied = False, True  # type: ignore[union-attr]
        else:
            state.replaced_weights[layer.site.name] = weight.detach().to("cpu", copy=True)
            weight.copy_(rest)


def bad_weight(layer: Adapted) -> list[Diagnostic]:
    """Why a layer's own weight is nothing that a delta could start from, where it starts at a part of it."""
    init, weight = layer.init, layer.weight
    if not init.residual_init or weight.is_meta:
        return []
    if is_quantized(layer.base):
        return [already_quantized(layer.site.name, init)]
    bad, name = int((~weight.isfinite()).sum()), type(init).__name__
    if bad:
        what = (
            f"{bad:,} of {weight.numel():,} numbers of its weight are NaN or infinite; {name} starts at its directions"
        )
        return [Diagnostic(layer.site.name, what, "repair the base, or exclude the layer")]
    return []


def cannot_learn(layer: Adapted) -> list[Diagnostic]:
    """Why a layer would never learn: both of its factors start at zero, as the weight does whose part they are."""
    if not layer.start or any(t.any() for t in layer.start.values()):
        return []
    what = f"its weight is zero, and so is the start that {type(layer.method.init).__name__} makes of it"
    return [Diagnostic(layer.site.name, f"{what}: nothing could be learnt", "exclude it, or use another init")]


def _alone(model: nn.Module, weight: nn.Parameter, state: AttachedState) -> bool:
    """Whether nothing else would change if a weight were written: nobody else holds it or its memory."""
    if any(step == 0 and n > 1 for step, n in zip(weight.stride(), weight.shape, strict=True)):
        return False  # its own numbers lie in the same memory
    held = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    # what another layer will be given back, but for the very same parameter: its values are kept apart
    held += [t for t in state.replaced_weights.values() if isinstance(t, nn.Parameter) and t is not weight]
    return sum(t is weight or _overlap(t, weight) for t in held) == 1


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have memory in common, such as a weight that was tied by its `.data`."""
    if torch.strided not in (one.layout, other.layout) or one.device != other.device or not one.data_ptr():
        return False
    spans = []
    for t in (one, other):
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


def load_start(model: nn.Module, layer: Adapted, tensors: Mapping[str, Tensor]) -> None:
    """Let what never trains in a layer be what a file says: where its delta started, and what all layers share.

    A start that was found again on another machine differs in its last bits, and with it what the base gave up.

    Raises:
        StateError: the start differs, and the base is sharded already, so that it cannot give up another part.
    """
    if layer.shared is not None:
        layer.shared.load({role: tensors[role] for role in layer.shared_shapes})
    if all(torch.equal(t, tensors[role].to(t)) for role, t in layer.start.items()):
        return
    if is_sharded(layer.weight) or is_quantized(layer.base):
        done = "packed" if is_quantized(layer.base) else "sharded"
        what, fix = f"began at other tensors here, and its weight is {done} already", "load it onto the plain base"
        raise StateError("cannot continue from this adapter:", [Diagnostic(layer.site.name, what, fix)])
    restore_weight(layer, cast(AttachedState, state_of(model)).replaced_weights[layer.site.name])
    layer.load({role: tensors[role] for role in layer.start})
    subtract_start(model, layer)


def original_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer as it was before it gave up a part of it, in the layer's own layout.

    Of a packed one it is what has been packed, as it is had from there.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, Adapted) and is_quantized(layer.base):
        W = _rest(layer, 1) if layer.start else layer.kind.matrix(layer.base)
        return layer.kind.weight(layer.base, W)
    if is_quantized(layer):
        return weight(layer)
    moved = cast(AttachedState, state_of(model)).replaced_weights if state_of(model) is not None else {}
    before = moved.get(name, base_parameter(model, f"{name}.weight"))
    if isinstance(before, nn.Parameter):  # of other layers, too: one of them may have given up a part for itself
        for other, values in moved.items():
            if not isinstance(values, nn.Parameter) and base_parameter(model, f"{other}.weight") is before:
                return values
    return before.detach()


def unwrapped_base(layer: Adapted) -> nn.Module:
    """The base of a layer, for itself: a packed one that had given up a part of its weight as a plain one with it."""
    if not (layer.start and is_quantized(layer.base)):
        return layer.base
    with torch.no_grad():
        return dequantized_layer(layer.base, layer.kind.weight(layer.base, _rest(layer, 1)).to(layer.dtype))


def restore_weight(layer: Adapted, before: Tensor) -> None:
    """Give a layer the weight that it had before it gave up a part of it."""
    if isinstance(before, nn.Parameter):
        before.data = before.data.to(layer.weight)  # where nobody else has moved it along
        layer.base.weight = before
    else:
        with torch.no_grad():
            cast(nn.Parameter, layer.weight).copy_(before)
