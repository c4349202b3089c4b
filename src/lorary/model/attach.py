"""attach, detach, disabled: what a plan does to a model, and the way back, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError, StateError
from lorary.layers.adapted import Adapted, SharedProjections, adapted_layers
from lorary.layers.other_quantizers import keep_layout
from lorary.layers.quantized_weight import stored_tensors
from lorary.model.checks import blocks_gradient, model_mismatches, not_quantizable, unwritable_weights
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.plan import Plan
from lorary.model.quantize import mode, remember, replace, shown
from lorary.model.residual_base import (
    bad_weight,
    cannot_learn,
    finalise_start,
    initialise_layer,
    restore_weight,
    unwrapped_base,
)
from lorary.model.scan import Scan, scan
from lorary.model.state import AttachedState, base_parameter, require, state_of
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

MASTERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what adapters may be learnt in


def attach(model: nn.Module, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Do what the plan says, in place: adapters at its sites, everything else frozen. Nothing moves yet.

    Args:
        model: the model that was planned, or one of the same shapes (a plan made on the meta device fits).
        plan: what `lorary.plan` made. Where its method packs the base, the weights that were are given up.
        seed: of the adapters' start; each site draws from the seed and its own name.
        dtype: of the learnt tensors.

    Returns:
        The same model.

    Raises:
        StateError: something is attached already.
        PlanError: the plan was made for another model; every mismatch. Or it is no plan, or the dtype cannot learn.
    """
    base = scan(model)
    packed = _to_pack(base, plan, dtype)
    full = {f.name: f.shape for f in plan.full}
    _put(base, plan.method, plan.sites, full, dtype=dtype, packed=packed)
    del base  # it holds every dense weight, and they are to go one at a time
    try:
        with mode(model):
            _start(model, seed, plan.fixed_tensors, packed)
            _pack(model, packed)
    except BaseException:
        detach(model)  # all or nothing
        raise
    return model


def _to_pack(base: Scan, plan: Plan, dtype: torch.dtype) -> list[str]:
    """The layers that are still to be quantised, by name: a base may have been loaded quantised.

    Raises:
        PlanError: the plan cannot be obeyed; every reason.
    """
    problems = []
    if not isinstance(plan, Plan):
        problems.append(
            Diagnostic("plan", f"is a {type(plan).__name__}, not a Plan", "make one: lorary.plan(model, method)")
        )
    if dtype not in MASTERS:
        known = ", ".join(str(d) for d in MASTERS)
        problems.append(Diagnostic("dtype", f"{dtype!r} is no precision to learn in", f"known: {known}"))
    packed: list[str] = []
    if not problems:
        packed = [name for name in plan.quantized if not base.is_quantised(name)]
        problems += unwritable_weights(base, plan.method, [f.name for f in plan.full if not f.trains])
        problems += not_quantizable(base, packed)
        problems += blocks_gradient(base, [p.site.name for p in plan.sites])
    if problems:
        raise PlanError("cannot attach:", problems)
    return packed


def _start(
    model: nn.Module, seed: int, given: Mapping[str, Mapping[str, Tensor]], packed: Collection[str] = ()
) -> None:
    """Fill all adapters, so that nothing moves at step 0 but for what earlier tasks have given."""
    # of layers that train one set of tensors in common the first one fills it
    layers = list({id(layer.params): layer for layer in reversed(adapted_layers(model).values())}.values())[::-1]
    if layers and layers[0].shared is not None:
        layers[0].init.share(layers[0].shared.tensors)
    if problems := [problem for layer in layers for problem in bad_weight(layer)]:
        raise PlanError("cannot attach:", problems)
    for layer in _shown(layers):
        packs = layer.site.name in packed
        initialise_layer(layer, seed, packs=packs)
        layer.load(given.get(layer.site.name, {}))
        finalise_start(model, layer, packs=packs)
        with torch.no_grad():
            layer.join.setup(layer)
    if problems := [problem for layer in layers for problem in cannot_learn(layer)]:
        raise PlanError("cannot attach:", problems)


def _pack(model: nn.Module, packed: Collection[str]) -> None:
    """Pack the layers of these names, one at a time, that are not adapted: those are packed."""
    layers = adapted_layers(model)
    storage = cast(AttachedState, state_of(model)).method.storage
    for name in shown([name for name in packed if name not in layers], "packing"):
        replace(model, name, storage.quantize(model.get_submodule(name)))


def attach_tensors(
    model: nn.Module,
    method: Method,
    placed: tuple[AdaptedSite, ...],
    full: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    base: Fingerprint | None = None,
    packed: Collection[str] = (),
) -> None:
    """Put adapters with these tensors at the sites, freeze and pack the rest, and remember the way back.

    Whoever has the base's fingerprint already gives it along: taking it reads a little of every parameter.
    """
    found = scan(model)
    if problems := not_quantizable(found, packed):
        raise PlanError("cannot attach:", problems)
    _put(found, method, placed, full, tensors=tensors, fingerprint=base, packed=packed)
    del found  # it holds every dense weight, and they are to go one at a time
    try:
        for layer in (
            shown(list(adapted_layers(model).values()), "packing") if packed else adapted_layers(model).values()
        ):
            finalise_start(model, layer, packs=layer.site.name in packed)  # there is a start already
        _pack(model, packed)
    except BaseException:
        detach(model)  # all or nothing
        raise


def _put(
    base: Scan,
    method: Method,
    placed: tuple[AdaptedSite, ...],
    full: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    fingerprint: Fingerprint | None = None,
    packed: Collection[str] = (),
) -> None:
    """Put adapters at the sites, zero or with the given tensors, freeze the rest, and remember the way back."""
    model = base.model
    if state_of(model) is not None:
        what = "something is attached already"
        raise StateError("cannot attach:", [Diagnostic("model", what, "detach it first, or use lorary.switch")])
    keep_layout(model)
    problems = model_mismatches(base, placed, full, packed)
    problems += [Diagnostic("context", *why) for why in (method.context.problems(model) if method.context else ())]
    if problems:
        raise PlanError("the plan does not fit this model:", problems)
    placed = tuple(_of_kind(p, base.modules[p.site.name].kind) for p in placed)
    paths = {p.site.name: list(base.modules[p.site.name].paths) for p in placed}
    fingerprint = fingerprint or Fingerprint.of(model)
    if packed:
        remember(model)
    trained = frozenset(name for name in base.names if base.parameter(name).requires_grad)
    kept = {}  # and the layers: all of them before the model changes: memory may run out on the way
    layers = _layers(base, placed, dtype)
    if tensors is not None:
        for p in placed:
            layer = layers[p.site.name]
            layer.load(tensors[p.site.name])
            if layer.shared is not None:
                layer.shared.load({role: tensors[p.site.name][role] for role in p.delta.shared})
    for name in full:
        value = base.parameter(name).detach()
        kept[name] = value.to("meta" if value.is_meta else "cpu", copy=True)
    reading = None if method.context is None else method.context.apply(model)
    model.requires_grad_(False)
    for name, layer in layers.items():
        for path in paths[name]:
            model.set_submodule(path, layer)
    for name in full.keys() - {f"{p.site.name}.weight" for p in placed}:  # an adapted weight is a rule's to write
        base.parameter(name).requires_grad_(True)
    object.__setattr__(
        model, STATE, AttachedState(method, placed, kept, trained, paths, fingerprint, context_patch=reading)
    )


def _layers(base: Scan, placed: tuple[AdaptedSite, ...], dtype: torch.dtype) -> dict[str, Adapted]:
    """site -> its adapted layer, zero and not yet in the model; sites that share have one set of tensors."""
    layers: dict[str, Adapted] = {}
    sets: dict[str, nn.ParameterDict] = {}
    with mode(base.model):
        bank = _bank(base.model, placed, dtype)
        for p in placed:
            plain = base.modules[p.site.name].module
            layer = layers[p.site.name] = Adapted(plain, p, dtype, bank, sets.get(p.share))
            layer.train(plain.training)
            if p.share:
                sets[p.share] = layer.params
    return layers


def _shown(layers: list[Adapted]) -> Iterable[Adapted]:
    """With a progress bar on a terminal, where a start has to decompose or to pack every weight."""
    slow = any(layer.init.residual_init or not layer.method.storage.writable for layer in layers)
    return shown(layers, "starting") if slow else layers


def _bank(model: nn.Module, placed: tuple[AdaptedSite, ...], dtype: torch.dtype) -> SharedProjections | None:
    """The bank of what all sites share, or None where they share nothing."""
    if not any(p.delta.shared for p in placed):
        return None
    return SharedProjections(placed, dtype, stored_tensors(model.get_submodule(placed[0].site.name))[0].device)


def _of_kind(p: AdaptedSite, kind: str | None) -> AdaptedSite:
    """The same for the layer that is here: a linear one, or GPT-2's, which keeps the same matrix transposed."""
    return dataclasses.replace(p, site=dataclasses.replace(p.site, kind=str(kind)))


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off: the very base, bit for bit, with the layers, values and flags that it had.

    A base that has been packed stays so: a packed layer that had given up a part of its weight (PiSSA) becomes a plain
    one, equal to what it was up to what packing has lost.

    Raises:
        StateError: nothing is attached, or it has been merged (unmerge first).
    """
    state = require(model, "detach")
    if state.context_patch:
        state.context_patch.revert()
    for name, value in state.full.items():
        parameter = base_parameter(model, name)
        parameter.grad = None  # it was that of another value
        with torch.no_grad():
            parameter.copy_(value)
    for name, layer in adapted_layers(model).items():
        if name in state.replaced_weights:
            restore_weight(layer, state.replaced_weights[name])
        base = unwrapped_base(layer)
        for path in state.paths[name]:
            model.set_submodule(path, base)
    if state.untied:
        cast(Any, model).config.tie_word_embeddings = True
    object.__delattr__(model, STATE)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in state.trained)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within, the model is its base: adapters do nothing, and parameters that were changed have their old values."""
    state = require(model, "disable")
    layers = list(adapted_layers(model).values())
    enabled = [layer.enabled for layer in layers]
    tuned = [(base_parameter(model, name), before) for name, before in state.full.items()]
    # weights that others hold come last: they may have moved for these, and have their values back by then
    moved = sorted(state.replaced_weights.items(), key=lambda item: isinstance(item[1], nn.Parameter))
    tuned += [(base_parameter(model, f"{site}.weight"), before) for site, before in moved]
    values = [parameter.data for parameter, _ in tuned]
    undone = (
        state.context_patch.reverted() if state.context_patch and not state.disabled_depth else contextlib.nullcontext()
    )
    state.disabled_depth += 1
    try:
        for layer in layers:
            layer.enabled = False
        for parameter, before in tuned:
            parameter.data = before.data.to(parameter)
        with undone:
            yield model
    finally:
        for layer, was in zip(layers, enabled, strict=True):
            layer.enabled = was
        for (parameter, _), value in zip(tuned, values, strict=True):
            parameter.data = value
        state.disabled_depth -= 1
