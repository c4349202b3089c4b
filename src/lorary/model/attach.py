"""attach, detach, disabled: put a plan's adapters on a model, and take them off bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model._insert import insert
from lorary.model.checks import blocks_gradient, not_quantizable, unwritable_weights
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.plan import Plan
from lorary.model.quantize import inference_mode_like, quantize_layers, with_progress
from lorary.model.reach.first_forward import FirstForward, warn_of_bypassed
from lorary.model.residual_base import (
    bad_weight,
    cannot_learn,
    finalise_start,
    initialise_layer,
    restore_weight,
    unwrapped_base,
)
from lorary.model.scan import Scan, scan
from lorary.model.state import AttachedState, base_parameter, require_attached, set_submodules, state_of
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

TRAINABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attach(model: nn.Module, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Attach a plan's adapters in place and freeze everything else; the model's outputs do not change yet.

    Args:
        model: the model that was planned, or one of the same shapes (a plan made on the meta device fits).
        plan: from `lorary.plan`. If its method quantises the base, the dense weights are dropped.
        seed: for the adapters' initialisation; each site draws from the seed and its own name.
        dtype: of the adapters' tensors.

    Returns:
        The same model.

    Raises:
        StateError: something is attached already.
        PlanError: the plan was made for another model; every mismatch. Or `plan` is not a Plan, or `dtype` is not a
            trainable dtype.

    Warns:
        ReachWarning: in the first training forward, if adapters did not run there whose layers the plan could not see
            running.
    """
    scanned = scan(model)
    quantized = _layers_to_quantize(scanned, plan, dtype)
    full = {f.name: f.shape for f in plan.full}
    insert(scanned, plan.method, plan.sites, full, dtype=dtype, quantized=quantized)
    del scanned  # it holds every dense weight, and quantising frees them one at a time
    with _detached_on_error(model), inference_mode_like(model):
        _start(model, seed, plan.fixed_tensors, quantized)
        _quantize_others(model, quantized)
    require_attached(model, "attach").first_forward = FirstForward(model, plan.unproved)
    return model


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
        problems += unwritable_weights(scanned, plan.method, [f.name for f in plan.full if not f.trains])
        problems += not_quantizable(scanned, quantized)
        problems += blocks_gradient(scanned, [p.site.name for p in plan.sites])
    if problems:
        raise PlanError("cannot attach:", problems)
    return quantized


def _start(model: nn.Module, seed: int, fixed: Mapping[str, Mapping[str, Tensor]], quantized: Collection[str]) -> None:
    """Initialise all adapters: the model's outputs change only by the fixed tensors of earlier tasks."""
    layers = list(adapted_layers(model).values())
    if layers and layers[0].shared is not None:
        layers[0].init.share(layers[0].shared.tensors)
    if problems := [problem for layer in layers for problem in bad_weight(layer)]:
        raise PlanError("cannot attach:", problems)
    initialised: set[int] = set()  # layers may train one set of tensors in common: the first one fills it
    for layer in _with_progress(layers):
        quantizes = layer.site.name in quantized
        first = id(layer.params) not in initialised
        if first:
            initialise_layer(layer, seed, quantizes=quantizes)
            layer.load(fixed.get(layer.site.name, {}))
        finalise_start(model, layer, quantizes=quantizes)
        if first:
            with torch.no_grad():
                layer.join.setup(layer)
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
    del scanned  # it holds every dense weight, and quantising frees them one at a time
    with _detached_on_error(model):
        for layer in _with_progress(list(adapted_layers(model).values())):
            finalise_start(model, layer, quantizes=layer.site.name in quantized)
        _quantize_others(model, quantized)


@contextlib.contextmanager
def _detached_on_error(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        detach(model)
        raise


def _with_progress(layers: list[Adapted]) -> Iterable[Adapted]:
    """A progress bar on a terminal if weights have to be decomposed or quantised."""
    slow = any(layer.init.residual_init or not layer.method.storage.writable for layer in layers)
    return with_progress(layers, "attaching") if slow else layers


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off: the base bit for bit, with its layers, values and flags as before.

    A quantised base stays quantised. A quantised layer whose start was subtracted (PiSSA) becomes a plain one with the
    original weight, up to quantisation error.

    Raises:
        StateError: nothing is attached, or it has been merged (unmerge first).
    """
    state = require_attached(model, "detach")
    if state.context_patch:
        state.context_patch.revert()
    if state.first_forward:
        state.first_forward.remove()
    for name, value in state.full.items():
        parameter = base_parameter(model, name)
        parameter.grad = None  # it was the gradient of another value
        with torch.no_grad():
            parameter.copy_(value)
    for name, layer in adapted_layers(model).items():
        if name in state.replaced_weights:
            restore_weight(layer, state.replaced_weights[name])
        set_submodules(model, state.paths[name], unwrapped_base(layer))
    if state.untied:
        cast(Any, model).config.tie_word_embeddings = True
    object.__delattr__(model, STATE)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in state.trained)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model inside the block: adapters do nothing, and changed parameters have their old values."""
    state = require_attached(model, "disable")
    layers = list(adapted_layers(model).values())
    enabled = [layer.enabled for layer in layers]
    # tied weights come last: their own values may have changed for another site, and are restored by then
    replaced = sorted(state.replaced_weights.items(), key=lambda item: isinstance(item[1], nn.Parameter))
    originals = [*state.full.items(), *((f"{site}.weight", before) for site, before in replaced)]
    parameters = [base_parameter(model, name) for name, _ in originals]
    values = [parameter.data for parameter in parameters]
    patch = None if state.disabled_depth else state.context_patch
    state.disabled_depth += 1
    try:
        for layer in layers:
            layer.enabled = False
        for parameter, (_, before) in zip(parameters, originals, strict=True):
            parameter.data = before.data.to(parameter)
        with patch.reverted() if patch else contextlib.nullcontext():
            yield model
    finally:
        for layer, was in zip(layers, enabled, strict=True):
            layer.enabled = was
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        state.disabled_depth -= 1
