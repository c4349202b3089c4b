"""The base of a delta that does not start at zero (PiSSA, OLoRA): W - s B0 A0, and the way back to W.

At attach the base becomes W - s B0 A0. The original weight is kept, so that detaching and merging are exact; B0 and A0
are kept as well, so that the adapter can be exported for the unmodified base.

A quantised base stores only the quantised residual (QPiSSA). The original weight is residual + s B0 A0, up to
quantisation error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError, StateError
from lorary.kernels.torch_internals import buffers_of, parameters_of
from lorary.layers.adapted import Adapted
from lorary.layers.dtensor import is_sharded
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import is_quantized, weight
from lorary.layers.wrappers import submodule
from lorary.model.quantize import already_quantized, dequantized_layer
from lorary.model.state import AttachedState, base_parameter, state_of
from lorary.model.tied_config import untie_config
from lorary.model.undo import Undo
from lorary.spec.calibration import CalibratedInit
from lorary.spec.placement import AdaptedSite, start_name


def initialise_layer(layer: Adapted, seed: int, fixed: Mapping[str, Tensor], *, quantizes: bool) -> None:
    """Fill a layer's tensors; iterate with quantisation if the base is to be quantised and the init asks for it.

    Args:
        layer: with its plain base.
        seed: of the random draw.
        fixed: role -> values that the plan has, such as those of earlier tasks, or a start measured on data.
        quantizes: whether attaching quantises the base.
    """
    init = layer.init
    if not init.starts_at_error:
        layer.initialise(seed)
    if quantizes and init.residual_init and not layer.weight.is_meta:
        W = _exact_matrix(layer)
        for i in range(0 if init.starts_at_error else 1, init.rounds):
            rest = _residual(layer) if i else W
            stored = layer.method.storage.quantize(layer.base, rest)  # of a transposed layer a linear one
            layer.initialise(seed, W - KINDS[cast(str, kind_of(stored))].matrix(stored).to(W.dtype))
    layer.load(fixed)
    if layer.start and isinstance(layer.init, CalibratedInit) and not layer.start.keys() & fixed.keys():
        layer.load({start_name(role): layer.params[role] for role in layer.delta.roles})


def finalise_start(model: nn.Module, layer: Adapted, undo: Undo, *, quantizes: bool) -> None:
    """Subtract the delta's start from the base, and quantise the base where asked to."""
    if not quantizes:
        subtract_start(model, layer, undo)
        return
    residual = _residual(layer) if layer.start and not layer.weight.is_meta else None
    _check_finite(layer, residual)
    layer.base = layer.method.storage.quantize(layer.base, residual)
    # GPT-2's transposed layer is quantised into a linear one
    layer.site = dataclasses.replace(layer.site, kind=cast(str, kind_of(layer.base)))


def _exact_matrix(layer: Adapted) -> Tensor:
    """The base's matrix [out, in], in at least 32 bits."""
    W = layer.kind.matrix(layer.base).detach()
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _residual(layer: Adapted, sign: int = -1) -> Tensor:
    """W - s B0 A0 [out, in] of the base's W, in at least 32 bits; with sign=1 the inverse, W + s B0 A0."""
    W = _exact_matrix(layer)
    B, A = (factor.to(W) for factor in cast("tuple[Tensor, Tensor]", layer.start_factors()))
    product = torch.baddbmm if layer.site.experts else torch.addmm
    return product(W, B, A, alpha=sign * layer.scale)


def _check_finite(layer: Adapted, residual: Tensor | None) -> None:
    if residual is not None and not residual.isfinite().all():
        what = f"the residual of its weight, W - s B A with s = {layer.scale:g}, is not finite in {residual.dtype}"
        raise PlanError("cannot attach:", [Diagnostic(layer.site.name, what, "use a smaller alpha, or check the base")])


def subtract_start(model: nn.Module, layer: Adapted, undo: Undo | None = None) -> None:
    """Make the base W - s B A of a delta's non-zero start, and keep the original weight.

    A weight that other layers hold too is left to them, and this layer gets its own.
    """
    weight = cast(nn.Parameter, layer.weight)
    if not layer.start or weight.is_meta:
        return
    state = cast(AttachedState, state_of(model))
    with torch.no_grad():
        residual = layer.kind.weight(layer.base, _residual(layer)).to(weight.dtype)
        _check_finite(layer, residual)
        if _is_unshared(model, weight, state):
            before = state.replaced_weights[layer.site.name] = weight.detach().to("cpu", copy=True)
            if undo is not None:
                undo.remember_values(weight, before)
            weight.copy_(residual)
        else:
            state.replaced_weights[layer.site.name] = weight
            layer.base.weight = nn.Parameter(residual, requires_grad=False)
            state.untied += untie_config(model)


def bad_weight(layer: Adapted) -> list[Diagnostic]:
    """Why an init that decomposes the weight cannot start at this one: quantised, NaN or infinite."""
    init, weight = layer.init, layer.weight
    if not init.residual_init or weight.is_meta:
        return []
    if is_quantized(layer.base):
        return [already_quantized(layer.site.name, init)]
    if bad := int((~weight.isfinite()).sum()):
        what = f"{bad:,} of {weight.numel():,} numbers of its weight are NaN or infinite"
        what = f"{what}; {type(init).__name__} starts at its directions"
        return [Diagnostic(layer.site.name, what, "repair the base, or exclude the layer")]
    return []


def not_calibrated(sites: Iterable[AdaptedSite], fixed: Mapping[str, Mapping[str, Tensor]]) -> list[Diagnostic]:
    """Why sites cannot start yet: their init reads data, and the plan has no values that were measured on some."""
    waiting = [p for p in sites if isinstance(p.init, CalibratedInit) and not fixed.get(p.site.name)]
    if not waiting:
        return []
    what = f"{type(waiting[0].init).__name__} starts {len(waiting)} layers from training data, and there is none"
    fix = "pass data: lorary.attach(model, plan, data=batches), or plan = lorary.calibrate(model, plan, batches)"
    return [Diagnostic("data", what, fix)]


def cannot_learn(layer: Adapted) -> list[Diagnostic]:
    """Why a layer cannot learn: a zero weight gives zero factors, through which no gradient flows."""
    if not layer.start or any(t.any() for t in layer.start.values()):
        return []
    what = f"its weight is zero, and so are the factors that {type(layer.init).__name__} takes from it"
    return [Diagnostic(layer.site.name, f"{what}: nothing could be learned", "exclude it, or use another init")]


def _is_unshared(model: nn.Module, weight: nn.Parameter, state: AttachedState) -> bool:
    """Whether a weight can be written without changing anything else: no other tensor uses its memory."""
    if any(step == 0 and n > 1 for step, n in zip(weight.stride(), weight.shape, strict=True)):
        return False  # an expanded tensor: its own numbers share memory
    held = [t for m in model.modules() for t in (*parameters_of(m).values(), *buffers_of(m).values()) if t is not None]
    # the weight of another site may get its memory back; the very same parameter is restored from its copy
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
    """Load a layer's tensors that never train: the start of its delta, and shared projections.

    A start that is recomputed on another machine differs in its last bits, and with it the base.

    Raises:
        StateError: the start differs, and the base is sharded or quantised already, so it cannot be subtracted.
    """
    if layer.shared is not None:
        layer.shared.load({role: tensors[role] for role in layer.shared_shapes})
    if all(torch.equal(t, tensors[role].to(t)) for role, t in layer.start.items()):
        return
    if is_sharded(layer.weight) or is_quantized(layer.base):
        done = "quantised" if is_quantized(layer.base) else "sharded"
        what, fix = f"started at other tensors here, and its weight is {done} already", "load it onto the plain base"
        raise StateError("cannot continue from this adapter:", [Diagnostic(layer.site.name, what, fix)])
    restore_weight(layer, cast(AttachedState, state_of(model)).replaced_weights[layer.site.name])
    layer.load({role: tensors[role] for role in layer.start})
    subtract_start(model, layer)


def original_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a layer before its delta's start was subtracted, in the layer's own layout.

    For a quantised layer: the dequantised weight.
    """
    layer = submodule(model, name)
    if isinstance(layer, Adapted) and is_quantized(layer.base):
        W = _residual(layer, 1) if layer.start else layer.kind.matrix(layer.base)
        return layer.kind.weight(layer.base, W)
    if is_quantized(layer):
        return weight(layer)
    state = state_of(model)
    replaced = {} if state is None else state.replaced_weights
    before = replaced.get(name, base_parameter(model, f"{name}.weight"))
    if isinstance(before, nn.Parameter):  # other layers hold it, and one of them may have written its own residual
        for other, values in replaced.items():
            if not isinstance(values, nn.Parameter) and base_parameter(model, f"{other}.weight") is before:
                return values
    return before.detach()


def unwrapped_base(layer: Adapted) -> nn.Module:
    """The base of a layer by itself; a quantised residual becomes a plain layer with the original weight."""
    if not (layer.start and is_quantized(layer.base)):
        return layer.base
    with torch.no_grad():
        return dequantized_layer(layer.base, layer.kind.weight(layer.base, _residual(layer, 1)).to(layer.dtype))


def restore_weight(layer: Adapted, before: Tensor, undo: Undo | None = None) -> None:
    """Give a layer back the weight from before its delta's start was subtracted."""
    if isinstance(before, nn.Parameter):
        before.data = before.data.to(layer.weight)  # the model may have moved meanwhile
        layer.base.weight = before
    else:
        if undo is not None:
            undo.remember_values(layer.weight)
        with torch.no_grad():
            cast(nn.Parameter, layer.weight).copy_(before)
