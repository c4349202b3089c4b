"""Adapters on a model: save the attached one, load one from a folder, switch to others on the same base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lorary._deprecated import warn
from lorary.adapters.adapter import Adapter, stacked
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.errors import Diagnostic, FileError, StateError
from lorary.layers.adapted import adapted_layers, base_parameters, unwrapped_modules
from lorary.layers.quantized_weight import is_quantized
from lorary.model.attach import attach_tensors, detach
from lorary.model.checks import layer_mismatches
from lorary.model.fingerprint import Fingerprint
from lorary.model.quantize import already_quantized, quantizable_layers, warn_of_quantization
from lorary.model.scan import scan
from lorary.model.state import base_parameter, require_attached, state_of


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the adapter attached to a model as an adapter folder.

    Raises:
        StateError: none is attached.
        FileError: the folder cannot be written.
    """
    save_adapter(Adapter.of(model), path, model=model)


def load(
    base: nn.Module,
    path: str | PathLike[str],
    *,
    strict: bool = True,
    force: bool = False,
    trainable: bool = False,
    quantize: bool = True,
    pack: bool | None = None,
) -> nn.Module:
    """Attach a saved adapter, lorary's, PEFT's or mlx-lm's, to its base, in place.

    Args:
        base: the model that it was trained on.
        path: the adapter folder.
        strict: refuse anything missing, unexpected, malformed or not finite; False tolerates what PEFT tolerates.
        force: accept another base than the one it was trained on, if every tensor fits.
        trainable: whether its parameters require gradients, for further training.
        quantize: quantise the layers that its method quantises (QLoRA). False keeps the base's own weights, which
            differ from those that the adapter was trained on.
        pack: deprecated name of `quantize`.

    Returns:
        The same model.

    Raises:
        FileError: every reason why the folder cannot be used on this base.
        StateError: an adapter is attached already.
    """
    if pack is not None:
        warn("lorary.load(pack=...)", "quantize=")
        quantize = pack
    if state_of(base) is not None:
        raise StateError(
            "cannot load:", [Diagnostic("model", "something is attached already", "lorary.switch replaces it")]
        )
    adapter = load_adapter(path, model=base, strict=strict)
    here = Fingerprint.of(base)
    _check_base(base, adapter, here, str(path), force=force or not strict)
    _install(base, adapter, here, trainable=trainable, quantize=quantize)
    return base


def switch(model: nn.Module, adapters: Adapter | Sequence[Adapter] | None, *, force: bool = False) -> nn.Module:
    """Replace the attached adapter by others on the same base: one, the sum of several, or none.

    The time depends on the adapters, not on the model. Parameters do not require gradients afterwards. A base that was
    quantised for one adapter stays quantised for the next.

    Args:
        model: the base, with or without an adapter.
        adapters: one, several (their updates add up), or None for the base alone.
        force: accept adapters of another base, if every tensor fits.

    Raises:
        FileError: an adapter does not fit the base; the model is unchanged.
        MethodError: several adapters have no sum.
        StateError: the model's adapter is merged.
    """
    several = _adapters(adapters)
    if state_of(model) is not None:
        require_attached(model, "switch")
    here = Fingerprint.of(model)
    for a in several:
        _check_base(model, a, here, "the adapter", force=force)
    replacement = several[0] if len(several) == 1 else stacked(several, model) if several else None
    if state_of(model) is not None:
        detach(model)
    if replacement is not None:
        _install(model, replacement, here, trainable=False)
    return model


def _adapters(adapters: Any) -> list[Adapter]:
    """The adapters of `switch` as a list.

    Raises:
        FileError: one of them is not an adapter.
    """
    alone = isinstance(adapters, (Adapter, str, PathLike)) or not isinstance(adapters or (), Iterable)
    several = [adapters] if alone else list(adapters or ())
    fix = "read one with lorary.load_adapter(path)"
    wrong = [Diagnostic(repr(a), "is not an adapter", fix) for a in several if not isinstance(a, Adapter)]
    if wrong:
        raise FileError("cannot switch adapters:", wrong)
    return several


def _check_base(model: nn.Module, adapter: Adapter, here: Fingerprint, where: str, *, force: bool) -> None:
    modules, problems = unwrapped_modules(model), []
    residual = {name for name, layer in adapted_layers(model).items() if layer.start}  # detaching makes them plain
    for adapted in adapter.sites:
        name = adapted.site.name
        problems += layer_mismatches(adapted.site, modules.get(name))
        if adapted.starts and is_quantized(modules.get(name)) and name not in residual:
            problems.append(already_quantized(name, adapted.init))
        problems += _tensor_problems(name, adapted.stored, adapter.tensors.get(name, {}))
    parameters = {name: tuple(t.shape) for name, t in base_parameters(model)}
    for name, tensor in adapter.full.items():
        if parameters.get(name) != tuple(tensor.shape):
            found = f"it is {parameters[name]}" if name in parameters else "it has no such parameter"
            problems.append(Diagnostic(name, f"the adapter holds {tuple(tensor.shape)} for it; in this model {found}"))
    problems += _context_problems(model, adapter)
    if not force:
        fix = "load the base that it was trained on, or pass force=True"
        problems += [Diagnostic(p.where, p.what, fix) for p in adapter.base.disagreements(here)]
    if problems:
        raise FileError(f"{where} does not fit this model:", problems)


def _context_problems(model: nn.Module, adapter: Adapter) -> list[Diagnostic]:
    """Why the base cannot have the adapter's context, regardless of the one applied now."""
    state, context = state_of(model), adapter.method.context
    if context is None:
        return []
    with state.context_patch.reverted() if state is not None and state.context_patch else contextlib.nullcontext():
        return [Diagnostic("context", *found) for found in context.problems(model)]


def _tensor_problems(
    name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> list[Diagnostic]:
    """The tensors of a site that are missing, unexpected, of another shape, or unusable."""
    shapes = {role: tuple(t.shape) for role, t in found.items()}
    reasons = [
        f"{role} is {shapes.get(role, 'missing')}, expected {expected.get(role, 'no such tensor')}"
        for role in sorted(expected.keys() | shapes.keys())
        if expected.get(role) != shapes.get(role)
    ]
    for role, t in found.items():
        if t.is_meta:
            reasons.append(f"{role} has no values: it is on the meta device")
        elif t.layout != torch.strided or not t.is_floating_point():
            reasons.append(
                f"{role} is a {t.layout} tensor of {t.dtype}, expected a dense one of floating-point numbers"
            )
    return [Diagnostic(name, what) for what in reasons]


def _install(model: nn.Module, adapter: Adapter, here: Fingerprint, *, trainable: bool, quantize: bool = True) -> None:
    full = {name: tuple(value.shape) for name, value in adapter.full.items()}
    storage = adapter.method.storage
    layers = quantizable_layers(scan(model), storage, full) if quantize and not storage.writable else []
    warn_of_quantization(unwrapped_modules(model), storage)
    attach_tensors(model, adapter.method, adapter.sites, full, adapter.tensors, fingerprint=here, quantized=layers)
    with torch.no_grad():
        for name, value in adapter.full.items():
            base_parameter(model, name).copy_(value)
    if not trainable:
        model.requires_grad_(False)
