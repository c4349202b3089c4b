"""Insertion of adapted layers into a model: everything else frozen, and the state that undoes it remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lorary.errors import Diagnostic, PlanError, StateError
from lorary.layers.adapted import Adapted, Parameters
from lorary.layers.other_quantizers import keep_layout
from lorary.layers.quantized_weight import stored_tensors, swap_hooks
from lorary.layers.shared_projections import SharedProjections
from lorary.model.buffers import freeze_statistics, frozen_buffers
from lorary.model.checks import model_mismatches
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.in_transformers import adopt
from lorary.model.optim.watch import watch
from lorary.model.scan import Scan
from lorary.model.state import AttachedState, set_submodules, state_of
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, joins_of, replaced_tables


def insert(
    scanned: Scan,
    method: Method,
    sites: tuple[AdaptedSite, ...],
    full: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    fingerprint: Fingerprint | None = None,
    quantized: Collection[str] = (),
) -> None:
    """Put adapters at the sites, zero or with the given tensors, freeze the rest and remember how to undo it."""
    model = scanned.model
    _check_fit(scanned, method, sites, full, quantized)
    sites = tuple(_with_kind(p, scanned.modules[p.site.name].kind) for p in sites)
    paths = {p.site.name: list(scanned.modules[p.site.name].paths) for p in sites}
    fingerprint = (fingerprint or Fingerprint.of(model)).without(model, {*full, *replaced_tables(sites)})
    total = scanned.sizes()[0]
    if quantized:
        fingerprint.remember(model)  # quantising changes parameters
    trained = frozenset(name for name in scanned.names if scanned.parameter(name).requires_grad)
    # memory may run out here, so the model changes only afterwards
    layers = _adapted(scanned, sites, dtype, tensors)
    kept = {}
    for name in full:
        value = scanned.tensor(name).detach()
        kept[name] = value.to("meta" if value.is_meta else "cpu", copy=True)
    patch = None if method.context is None else method.context.apply(model)
    model.requires_grad_(False)
    for name, layer in layers.items():
        swap_hooks(layer.base, layer)
        set_submodules(model, paths[name], layer)
    for name in (full.keys() & scanned.names.keys()) - {p.site.weight_name for p in sites}:
        scanned.parameter(name).requires_grad_(True)  # an adapted weight is written by a rule alone
    state = AttachedState(method, sites, kept, trained, paths, fingerprint, total, context_patch=patch)
    state.buffers = frozen_buffers(model, full)
    state.evaluating = freeze_statistics(model, full)
    object.__setattr__(model, STATE, state)
    adopt(model)
    watch(model)


def _check_fit(
    scanned: Scan,
    method: Method,
    sites: tuple[AdaptedSite, ...],
    full: Mapping[str, tuple[int, ...]],
    quantized: Collection[str],
) -> None:
    """Refuse a model that is adapted already or does not fit.

    Raises:
        StateError: something is attached already.
        PlanError: every mismatch.
    """
    model = scanned.model
    if state_of(model) is not None:
        what = "something is attached already"
        raise StateError("cannot attach:", [Diagnostic("model", what, "detach it first, or use lorary.switch")])
    keep_layout(model)
    problems = model_mismatches(scanned, sites, full, quantized)
    if method.context is not None:
        found = method.context.problems(model)
        problems += [Diagnostic("context", *why) for why in found]
        if not found:  # the sites are looked for in a model that fits
            problems += [Diagnostic("sites", *why) for why in method.context.site_problems(model, joins_of(sites))]
    if problems:
        raise PlanError("the plan does not fit this model:", problems)


def _with_kind(p: AdaptedSite, kind: str | None) -> AdaptedSite:
    """The site with the kind of this model's layer: a planned linear layer may be GPT-2's transposed one here."""
    return p if p.site.kind == kind else dataclasses.replace(p, site=dataclasses.replace(p.site, kind=str(kind)))


def _adapted(
    scanned: Scan,
    sites: tuple[AdaptedSite, ...],
    dtype: torch.dtype,
    tensors: Mapping[str, Mapping[str, Tensor]] | None,
) -> dict[str, Adapted]:
    """site -> its adapted layer, not yet in the model; zero, or with these tensors."""
    layers: dict[str, Adapted] = {}
    sets: dict[str, Parameters] = {}  # sites may share one set of tensors
    projections = None
    if sharing := [p.site.name for p in sites if p.delta.shared]:  # VeRA
        device = stored_tensors(scanned.modules[sharing[0]].module)[0].device
        projections = SharedProjections(sites, dtype, device)
    for p in sites:
        name = p.site.name
        plain = scanned.modules[name].module
        layer = layers[name] = Adapted(plain, p, dtype, projections if p.delta.shared else None, sets.get(p.share))
        layer.train(plain.training)
        if p.share:
            sets[p.share] = layer.params
    if tensors is not None:
        for name, layer in layers.items():
            layer.load(tensors[name])
            if layer.shared is not None:
                layer.shared.load({role: tensors[name][role] for role in layer.shared_shapes})
    return layers
