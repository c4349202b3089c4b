"""attach, detach: put a plan's adapters on a model, and take them off bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError
from lorary.layers.adapted import Adapted, adapted_layers, base_parameters
from lorary.layers.quantized_weight import stored_tensors, swap_hooks
from lorary.layers.shared_projections import SharedProjections
from lorary.model._insert import insert
from lorary.model._statistics import Loss
from lorary.model.ambient import mode_independent
from lorary.model.buffers import changed_buffers
from lorary.model.calibration import calibrate
from lorary.model.checks import blocks_gradient, changeable, not_quantizable, unwritable_weights
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.in_transformers import release
from lorary.model.plan import Plan
from lorary.model.quantize import quantize_layers, with_progress
from lorary.model.reach.first_forward import FirstForward, warn_of_bypassed
from lorary.model.residual_base import (
    bad_weight,
    cannot_learn,
    finalise_start,
    initialise_layer,
    not_calibrated,
    restore_weight,
    unwrapped_base,
)
from lorary.model.scan import Scan, scan
from lorary.model.state import AttachedState, base_parameter, require_attached, set_submodules, state_of
from lorary.model.tied_config import tie_config
from lorary.model.undo import Undo, all_or_nothing
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, rules_of

TRAINABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@mode_independent
def attach(
    model: nn.Module,
    plan: Plan,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Attach a plan's adapters in place and freeze everything else; the model's outputs do not change yet.

    All or nothing: after any exception the model is as it was before. If the method quantises the base, the dense
    weights are therefore freed at the end, all at once (`lorary.load_quantized` never holds all of them).

    Args:
        model: the model that was planned, or one of the same shapes (a plan made on the meta device fits).
        plan: from `lorary.plan`.
        seed: for the adapters' initialisation; each site draws from the seed and its own name.
        dtype: of the adapters' tensors.
        data: batches of the training data, for a method whose start reads them (`lorary.calibrate`).
        loss: (the model's output, the batch) -> the loss; by default the output's own `loss`.

    Returns:
        The same model.

    Raises:
        StateError: something is attached already, by lorary or by PEFT; or the model is wrapped by DDP or sharded by
            FSDP, which would not see the new parameters: attach first.
        PlanError: the plan was made for another model; every mismatch. Or `plan` is not a Plan, or `dtype` is not a
            trainable dtype. Or its start reads data: there is none, or it does not determine a start.

    Warns:
        ReachWarning: in the first training forward, about adapters that did not run there, among those that no dry
            forward has shown to run.
    """
    inner = changeable(model, "attach", trains=True)
    if not isinstance(seed, Integral):
        raise PlanError("cannot attach:", [Diagnostic("seed", f"is {seed!r}, not a whole number")])
    scanned = scan(inner)
    quantized = _layers_to_quantize(scanned, plan, dtype)
    if data is not None:
        plan = calibrate(inner, plan, data, loss=loss, seed=int(seed))
    elif problems := not_calibrated(_with_values(scanned, plan.sites), plan.fixed_tensors):
        raise PlanError("cannot attach:", problems)
    full = {f.name: f.shape for f in plan.full}
    with all_or_nothing(inner) as undo:
        insert(scanned, plan.method, plan.sites, full, dtype=dtype, quantized=quantized)
        _start(inner, seed, plan.fixed_tensors, quantized, undo)
        _quantize_others(inner, quantized)
        require_attached(inner, "attach").first_forward = FirstForward(inner, plan.unproved)
    return model


def _with_values(scanned: Scan, sites: Iterable[AdaptedSite]) -> list[AdaptedSite]:
    """The sites whose layers are not on the meta device, where nothing starts."""
    found = [(p, scanned.modules[p.site.name].module) for p in sites if p.site.name in scanned.modules]
    return [p for p, layer in found if not stored_tensors(layer)[0].is_meta]


def _layers_to_quantize(scanned: Scan, plan: Plan, dtype: torch.dtype) -> list[str]:
    """The paths of the layers that still have to be quantised; a base may have been loaded quantised.

    Raises:
        PlanError: the plan cannot be carried out; every reason.
    """
    problems = []
    if not isinstance(plan, Plan):
        what = f"is a {type(plan).__name__}, not a Plan"
        problems.append(Diagnostic("plan", what, "make one: lorary.plan(model, method)"))
    if dtype not in TRAINABLE_DTYPES:
        known = ", ".join(map(str, TRAINABLE_DTYPES))
        problems.append(Diagnostic("dtype", f"{dtype!r} is not a trainable dtype", f"known: {known}"))
    quantized: list[str] = []
    if not problems:
        quantized = [path for path in plan.quantized if not scanned.is_quantised(path)]
        problems += unwritable_weights(scanned, rules_of(plan.sites), [f.name for f in plan.full if not f.trains])
        problems += not_quantizable(scanned, quantized)
        problems += blocks_gradient(scanned, [p.site.name for p in plan.sites])
    if problems:
        raise PlanError("cannot attach:", problems)
    return quantized


def _start(
    model: nn.Module,
    seed: int,
    fixed: Mapping[str, Mapping[str, Tensor]],
    quantized: Collection[str],
    undo: Undo,
) -> None:
    """Initialise all adapters: the model's outputs change only by the fixed tensors of earlier tasks."""
    layers = list(adapted_layers(model).values())
    for layer in [layer for layer in layers if layer.shared is not None][:1]:
        layer.init.share(cast(SharedProjections, layer.shared).tensors)
    if problems := [problem for layer in layers for problem in bad_weight(layer)]:
        raise PlanError("cannot attach:", problems)
    initialised: set[int] = set()  # layers may train one set of tensors in common: the first one fills it
    for layer in _with_progress(layers):
        quantizes = layer.site.name in quantized
        first = id(layer.params) not in initialised
        if first:
            initialise_layer(layer, seed, fixed.get(layer.site.name, {}), quantizes=quantizes)
        finalise_start(model, layer, undo, quantizes=quantizes)
        if first:
            with torch.no_grad():
                layer.join.setup(layer, layer.generator(seed))
            initialised.add(id(layer.params))
    if problems := [problem for layer in layers for problem in cannot_learn(layer)]:
        raise PlanError("cannot attach:", problems)


def _quantize_others(model: nn.Module, quantized: Collection[str]) -> None:
    """Quantise the layers without an adapter, one at a time; `finalise_start` has quantised the adapted ones."""
    adapted = adapted_layers(model)
    storage = cast(AttachedState, state_of(model)).method.storage
    quantize_layers(model, [path for path in quantized if path not in adapted], storage)


def attach_tensors(
    model: nn.Module,
    method: Method,
    sites: tuple[AdaptedSite, ...],
    full: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    undo: Undo,
    *,
    fingerprint: Fingerprint | None = None,
    quantized: Collection[str] = (),
) -> None:
    """Attach adapters with given tensors, in place; freeze and quantise the rest.

    Args:
        model: the base.
        method: the method.
        sites: the adapted sites.
        full: base parameter that trains in full -> its shape.
        tensors: site -> role -> values.
        undo: of the model.
        fingerprint: of the base, if the caller has it: taking it reads a little of every parameter.
        quantized: the paths of the layers to quantise.

    Warns:
        ReachWarning: sites whose layer the model never calls.
    """
    scanned = scan(model)
    warn_of_bypassed(scanned, [p.site.name for p in sites])
    if problems := not_quantizable(scanned, quantized):
        raise PlanError("cannot attach:", problems)
    insert(scanned, method, sites, full, tensors=tensors, fingerprint=fingerprint, quantized=quantized)
    for layer in _with_progress(list(adapted_layers(model).values())):
        finalise_start(model, layer, undo, quantizes=layer.site.name in quantized)
    _quantize_others(model, quantized)


def _with_progress(layers: list[Adapted]) -> Iterable[Adapted]:
    """A progress bar on a terminal if weights have to be decomposed or quantised."""
    slow = any(layer.init.residual_init or not layer.method.storage.writable for layer in layers)
    return with_progress(layers, "attaching") if slow else layers


@mode_independent
def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off: the base bit for bit, with its layers, values and flags as before. All or nothing.

    A quantised base stays quantised. A quantised layer whose start was subtracted (PiSSA) becomes a plain one with the
    original weight, up to quantisation error.

    Raises:
        StateError: nothing is attached, or it has been merged (unmerge first).
    """
    inner = changeable(model, "detach")
    require_attached(inner, "detach")
    with all_or_nothing(inner) as undo:
        remove(inner, undo)
    return model


def remove(model: nn.Module, undo: Undo) -> None:
    """Take the adapters off a model that has some, unmerged and enabled."""
    state = cast(AttachedState, state_of(model))
    if state.holder is not None:
        state.holder.keep(model, state)
    release(model)
    for name, value in changed_buffers(model, state.buffers).items():
        base_parameter(model, name).data = value.to(base_parameter(model, name))
    if state.context_patch:
        state.context_patch.revert()
    if state.first_forward:
        state.first_forward.remove()
    for name, value in state.full.items():
        parameter = base_parameter(model, name)
        parameter.grad = None  # it was the gradient of another value
        undo.remember_values(parameter)
        with torch.no_grad():
            parameter.copy_(value)
    for name, layer in adapted_layers(model).items():
        if name in state.replaced_weights:
            restore_weight(layer, state.replaced_weights[name], undo)
        base = unwrapped_base(layer)
        swap_hooks(layer, base)
        set_submodules(model, state.paths[name], base)
    tie_config(state.untied)
    for mode in state.evaluating:
        mode.revert(model.training)
    object.__delattr__(model, STATE)
    for name, parameter in base_parameters(model):
        if parameter.is_floating_point():
            parameter.requires_grad_(name in state.trained)
