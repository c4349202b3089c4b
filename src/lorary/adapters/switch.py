"""Adapters on a model: save the attached one, load one from a folder, switch to others on the same base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lorary._deprecated import warn
from lorary.adapters._held import HeldAdapter, to_attach
from lorary.adapters._names import held_under, weights_of_names
from lorary.adapters._swap import swapped
from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.mix import stacked
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.adapters.tensor_checks import tensor_problems
from lorary.errors import Diagnostic, FileError, StateError, caller_stacklevel, deduplicated
from lorary.layers.adapted import unwrapped_modules
from lorary.model.ambient import mode_independent
from lorary.model.attach import attach_tensors, remove
from lorary.model.base import Base
from lorary.model.checks import changeable, layer_mismatches, site_mismatches
from lorary.model.fingerprint import Fingerprint
from lorary.model.optim.watch import warn_of_idle_rules
from lorary.model.quantize import already_quantized, quantizable_layers, warn_of_quantization
from lorary.model.scan import scan
from lorary.model.state import base_parameter, require_attached, state_of
from lorary.model.undo import Undo, all_or_nothing
from lorary.model.vocabulary import why_other_vocabulary
from lorary.spec.context import reverted
from lorary.spec.placement import replaced_tables

_OTHER_BASE = "load the base that it was trained on, or pass force=True"


@mode_independent
def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write the adapter attached to a model as an adapter folder.

    Raises:
        StateError: none is attached.
        FileError: the folder cannot be written.

    Warns:
        MethodWarning: an optimizer has trained it, and the method's rules have never run.
    """
    adapter = Adapter.of(model)
    warn_of_idle_rules(model)
    save_adapter(adapter, path, model=model)


@mode_independent
def load(
    base: nn.Module,
    path: str | PathLike[str],
    *,
    strict: bool = True,
    force: bool = False,
    trainable: bool = False,
    quantize: bool = True,
    expert_layout: str | None = None,
    pack: bool | None = None,
) -> nn.Module:
    """Attach a saved adapter, lorary's or another tool's (`load_adapter`), to its base, in place. All or nothing.

    Args:
        base: the model that it was trained on.
        path: the adapter folder or file.
        strict: refuse anything missing, unexpected, malformed or not finite; False tolerates what PEFT tolerates in the
            files. The base is checked all the same.
        force: accept another base than the one it was trained on, if every tensor fits.
        trainable: whether its parameters require gradients, for further training.
        quantize: quantise the layers that its method quantises (QLoRA). False keeps the base's own weights, which
            differ from those that the adapter was trained on.
        expert_layout: see `load_adapter`.
        pack: deprecated name of `quantize`.

    Returns:
        The same model.

    Raises:
        FileError: every reason why the folder cannot be used on this base.
        StateError: an adapter is attached already.
    """
    if pack is not None:
        warn("lorary.load(pack=...)", "quantize=", stacklevel=caller_stacklevel() + 1)
        quantize = pack
    inner = changeable(base, "load", trains=trainable)
    if state_of(inner) is not None:
        raise StateError(
            "cannot load:", [Diagnostic("model", "something is attached already", "lorary.switch replaces it")]
        )
    adapter = load_adapter(path, model=inner, strict=strict, expert_layout=expert_layout)
    put_on(inner, adapter, str(path), force=force, trainable=trainable, quantize=quantize)
    return base


def put_on(
    model: nn.Module,
    adapter: Adapter,
    where: str,
    *,
    force: bool = False,
    trainable: bool,
    quantize: bool = True,
    fix: str = _OTHER_BASE,
) -> None:
    """Attach a trained adapter to its base, a model without one. All or nothing; see `load`.

    Raises:
        FileError: it does not fit; `where` is its folder, and `fix` the hint if the base is another one.
    """
    base = Base(model)
    check_base(base, adapter, where, force=force, fix=fix)
    with all_or_nothing(model) as undo:
        _install(model, adapter, base.fingerprint, undo, trainable=trainable, quantize=quantize)


@mode_independent
def switch(
    model: nn.Module,
    adapters: Adapter | Sequence[Adapter] | str | Sequence[str] | Mapping[str, float] | None,
    *,
    force: bool = False,
    trainable: bool = False,
) -> nn.Module:
    """Replace the attached adapter by others on the same base: one, the sum of several, or none.

    The time depends on the adapters, not on the model; between adapters that the model holds at the same sites, tensors
    are neither copied nor moved. All or nothing: if the new adapter cannot be attached, for whatever reason, the model
    keeps the old one. A base that was quantised for one adapter stays quantised for the next.

    Args:
        model: the base, with or without an adapter.
        adapters: one, several (their updates add up), or None for the base alone; or names of adapters that the model
            holds (`lorary.named_adapters`), with a weight for each: `{"a": 0.7, "b": 0.3}`.
        force: accept adapters of another base, if every tensor fits.
        trainable: whether its parameters require gradients; of one adapter only. Training changes the adapter that is
            held under the name.

    Raises:
        FileError: an adapter does not fit the base, or a name or a weight is wrong; the model is unchanged.
        MethodError: several adapters have no sum.
        StateError: the model's adapter is merged or disabled; or several adapters were to train.

    Example:
        >>> lorary.switch(model, {"french": 0.7, "legal": 0.3})
    """
    weights = weights_of_names(adapters)
    several = [] if weights is not None else _adapters(adapters)
    inner = changeable(model, "switch", trains=trainable)
    if state_of(inner) is not None:
        require_attached(inner, "switch")
    if trainable and (len(several) > 1 if weights is None else [w for _, w in weights] != [1.0]):
        what, fix = "a weighted sum cannot train: none of its adapters would change", "hold the sum as an adapter"
        raise StateError("cannot switch adapters:", [Diagnostic("trainable", what, fix)])
    if weights is not None:
        activate(inner, held_under(inner, weights), force=force, trainable=trainable)
        return model
    base = Base(inner)
    for a in several:
        check_base(base, a, "the adapter", force=force)
    replacement = several[0] if len(several) == 1 else stacked(several, inner) if several else None
    with all_or_nothing(inner) as undo:
        if state_of(inner) is not None:
            remove(inner, undo)
        if replacement is not None:
            _install(inner, replacement, base.fingerprint, undo, trainable=trainable)
    return model


def activate(model: nn.Module, weights: dict[HeldAdapter, float], *, force: bool = False, trainable: bool) -> None:
    """Attach one held adapter or a weighted sum of several. All or nothing; see `switch`."""
    state, here = state_of(model), Fingerprint.of(model)
    if state is not None and state.holder is not None:
        state.holder.keep(model, state)
    held, chosen = to_attach(model, weights, here, trainable=trainable)
    if swapped(model, held, here, chosen, trainable=trainable):
        return
    view, where = held.view(), f"the adapter {held.name!r}"
    check_base(Base(model, here), view, where, force=force or held.checked == here)
    with all_or_nothing(model) as undo:
        if state is not None:
            remove(model, undo)
        _install(model, view, here, undo, trainable=trainable)
        held.take_over(model, trainable=trainable)
        chosen.record(require_attached(model, "switch"))
    held.checked = here


def _adapters(adapters: Any) -> list[Adapter]:
    """The adapters of `switch` as a list.

    Raises:
        FileError: one of them is not an adapter.
    """
    adapters = () if adapters is None else adapters
    alone = isinstance(adapters, (Adapter, PathLike, Tensor)) or not isinstance(adapters, Iterable)
    several = [adapters] if alone else list(adapters)
    fix = "read one with lorary.load_adapter(path)"
    wrong = [Diagnostic(repr(a), "is not an adapter", fix) for a in several if not isinstance(a, Adapter)]
    if wrong:
        raise FileError("cannot switch adapters:", wrong)
    return several


def check_base(base: Base, adapter: Adapter, where: str, *, force: bool, fix: str = _OTHER_BASE) -> None:
    """Refuse an adapter that does not fit a base.

    Raises:
        FileError: every reason; `where` is its folder, and `fix` the hint if the base is another one.
    """
    problems = base_mismatches(base, adapter) + _meta_problems(base, adapter)
    if problems and (other := why_other_vocabulary(base, _vocabularies(adapter))):
        raise FileError(f"{where} does not fit this model:", other)
    if not force:
        here = base.fingerprint.without(base.model, {*adapter.full, *replaced_tables(adapter.sites)})
        problems += [Diagnostic(p.where, p.what, fix) for p in adapter.base.disagreements(here)]
    if problems:
        raise FileError(f"{where} does not fit this model:", problems)


def _vocabularies(adapter: Adapter) -> dict[str, int]:
    """Path -> the number of tokens for which an adapter has rows there, whatever the layer is."""
    sites = (a.site for a in adapter.sites)
    rows = {s.name: s.in_features if s.kind == "embedding" else s.out_features for s in sites}
    tables = {name.removesuffix(".weight"): t.shape[0] for name, t in adapter.full.items() if t.dim() == 2}
    return rows | tables


def base_mismatches(base: Base, adapter: Adapter) -> list[Diagnostic]:
    """Why a base cannot take an adapter: layers, shapes, quantisation, context; it may be without values."""
    problems = []
    for adapted in adapter.sites:
        name = adapted.site.name
        if name in base.kinds:
            problems += site_mismatches(adapted.site, base.site(name))
        else:
            problems += layer_mismatches(adapted.site, base.modules.get(name))
        if adapted.starts and name in base.quantized and name not in base.residual:  # detaching makes those plain
            problems.append(already_quantized(name, adapted.init))
        problems += tensor_problems(name, adapted.stored, adapter.tensors.get(name, {}))
    for name, tensor in adapter.full.items():
        here = tuple(base.tensors[name].shape) if name in base.tensors else None
        if here != tuple(tensor.shape):
            found = "it has no such parameter" if here is None else f"it is {here}"
            problems.append(Diagnostic(name, f"the adapter holds {tuple(tensor.shape)} for it; in this model {found}"))
    return problems + _context_problems(base.model, adapter)


def _meta_problems(base: Base, adapter: Adapter) -> list[Diagnostic]:
    """The layers without values, on which the adapter would lose its own."""
    what, fix = "is on the meta device, where the adapter would lose its values", "load the base's weights first"
    empty = [adapted.site.name for adapted in adapter.sites if adapted.site.name in base.empty]
    return deduplicated(Diagnostic(name, what, fix) for name in empty)


def _context_problems(model: nn.Module, adapter: Adapter) -> list[Diagnostic]:
    """Why the base cannot have the adapter's context, regardless of the one applied now."""
    state, context = state_of(model), adapter.method.context
    if context is None:
        return []
    with reverted(state.context_patch if state is not None else None):
        return [Diagnostic("context", *found) for found in context.problems(model)]


def _install(
    model: nn.Module, adapter: Adapter, here: Fingerprint, undo: Undo, *, trainable: bool, quantize: bool = True
) -> None:
    full = {name: tuple(value.shape) for name, value in adapter.full.items()}
    storage = adapter.method.storage
    layers = quantizable_layers(scan(model), storage, full) if quantize and not storage.writable else []
    warn_of_quantization(unwrapped_modules(model), storage)
    attach_tensors(
        model, adapter.method, adapter.sites, full, adapter.tensors, undo, fingerprint=here, quantized=layers
    )
    with torch.no_grad():
        for name, value in adapter.full.items():
            parameter = base_parameter(model, name)
            undo.remember_values(parameter)
            parameter.copy_(value)
    if not trainable:
        model.requires_grad_(False)
