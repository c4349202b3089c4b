"""Adapter: a trained adapter as a value. What files hold, what mixing maps over, what serving loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted, adapted, base_parameters, corner, plain_modules
from lorary.errors import FileError, MethodError, Problem, StateError
from lorary.fingerprint import Fingerprint
from lorary.forms import LowRankForm, low_rank_forms
from lorary.methods.lora import Add, Fixed, Kaiming, LowRank
from lorary.packing import packable, packed_already, warn_of_packing
from lorary.placed import Placed
from lorary.preconditions import mismatch
from lorary.record import Method
from lorary.shards import whole
from lorary.shrinking import compact
from lorary.state import attached, base_parameter, require
from lorary.storage.as_is import AsIs
from lorary.surgery import detach, place
from lorary.weights import is_packed
from lorary.words import Init, Storage


@dataclass(frozen=True)
class Adapter:
    """A trained adapter as a value: method, tensors, and the fingerprint of its base.

    Args:
        method: the method, at the rank that sites without one of their own take.
        placed: the adapted sites, each with the method there.
        tensors: site -> role -> tensor.
        full: base parameter -> its trained value.
        base: the fingerprint of the base that it was trained on.
        notes: what the reader of its file found worth knowing.
    """

    method: Method
    placed: tuple[Placed, ...] = field(repr=False)
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    full: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    base: Fingerprint = field(default_factory=Fingerprint)
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module) -> Adapter:
        """A copy of what is attached to a model.

        Raises:
            StateError: nothing is.
        """
        state = require(model, "take from the model")
        tensors = _taken(adapted(model))
        full = {name: whole(base_parameter(model, name)) for name in state.full}
        return Adapter(state.method, state.placed, tensors, full, Fingerprint.of(model))

    @staticmethod
    def load(path: str | PathLike[str], *, strict: bool = True) -> Adapter:
        """Read an adapter folder, lorary's or PEFT's.

        Args:
            path: the folder.
            strict: refuse whatever is missing, left over, malformed or not finite; False tolerates what PEFT does.

        Raises:
            FileError: every reason at once.
        """
        from lorary import formats  # the one import that goes up: files are made of adapters

        return formats.load_adapter(path, strict=strict)

    def save(self, path: str | PathLike[str]) -> None:
        """Write an adapter folder; a killed process leaves the old one or the new one."""
        from lorary import formats

        formats.save_adapter(self, path)

    def low_rank(self, base: nn.Module | None = None) -> dict[str, LowRankForm]:
        """site -> (B, A, gain, shift) on the unmodified base, in fp32: how everything downstream sees any method.

        What the base gave up at the start (PiSSA, OLoRA) is subtracted: such an adapter has twice its rank here.

        Args:
            base: the base, for the methods whose gain or shift depends on its weights (DoRA, GLoRA).

        Raises:
            MethodError: a method has no such form, or none without the base; the base lacks a layer. Each reason once.
        """
        return low_rank_forms(self.placed, self.tensors, base)

    def compact(self) -> Adapter:
        """The same function without the directions that do nothing (AdaLoRA's masked ones)."""
        placed, tensors = compact(self.placed, self.tensors)
        return dataclasses.replace(self, placed=placed, tensors=tensors)

    @property
    def size(self) -> int:
        """Bytes of all its tensors; what sites share counts once."""
        every = [t for roles in self.tensors.values() for t in roles.values()] + list(self.full.values())
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in every}.values())


def _taken(layers: Mapping[str, Adapted]) -> dict[str, dict[str, Tensor]]:
    """site -> role -> a copy of everything that belongs to the adapter; what is shared is copied once."""
    bank: dict[str, Tensor] = {}
    own: dict[int, dict[str, Tensor]] = {}  # layers may train one set of tensors in common
    for layer in layers.values():
        if not bank and layer.shared is not None:
            bank = {role: whole(t) for role, t in layer.shared.tensors.items()}
        if id(layer.p) not in own:
            own[id(layer.p)] = {role: whole(t) for role, t in layer.p.items()}
    return {
        name: own[id(layer.p)]
        | {role: corner(bank[role], shape) for role, shape in layer.corners.items()}
        | {role: t.clone() for role, t in layer.start.items()}
        for name, layer in layers.items()
    }


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write what is attached to a model as an adapter folder.

    Raises:
        StateError: nothing is attached.
        FileError: the folder cannot be written.
    """
    from lorary import formats  # as in Adapter.load

    formats.save_adapter(Adapter.of(model), path, model=model)  # the model tells which modules were trained whole


def load(
    base: nn.Module,
    path: str | PathLike[str],
    *,
    strict: bool = True,
    force: bool = False,
    trainable: bool = False,
    pack: bool = True,
) -> nn.Module:
    """Attach a saved adapter, lorary's or PEFT's, to its base, in place.

    Args:
        base: the model that it was trained on.
        path: the adapter folder.
        strict: refuse whatever is missing, left over, malformed or not finite; False tolerates what PEFT does.
        force: accept a base that is not the one it was trained on, so long as every tensor fits.
        trainable: whether its parameters require gradients, to go on training.
        pack: pack the layers that its method packs (QLoRA). False leaves the base's own weights, which are not those
            that such an adapter was trained on.

    Returns:
        The same model.

    Raises:
        FileError: every reason why the folder cannot be used on this base.
        StateError: something is attached already.
    """
    from lorary import formats  # as in Adapter.load

    if attached(base) is not None:
        raise StateError(
            "cannot load:", [Problem("model", "something is attached already", "lorary.switch replaces it")]
        )
    adapter = formats.load_adapter(path, model=base, strict=strict)
    here = Fingerprint.of(base)
    _check_base(base, adapter, here, str(path), force=force or not strict)
    _install(base, adapter, here, trainable=trainable, pack=pack)
    return base


def switch(model: nn.Module, adapters: Adapter | Sequence[Adapter] | None, *, force: bool = False) -> nn.Module:
    """Another task on the same base: take off what is attached and put these on, their sum if there are several.

    Takes time in proportion to the adapters, not to the model. Parameters do not require gradients afterwards. A base
    that has been packed for an adapter stays packed beneath the next one.

    Args:
        model: the base, with or without an adapter.
        adapters: one, several (their updates add up), or None for the base alone.
        force: accept adapters of another base, so long as every tensor fits.

    Raises:
        FileError: an adapter does not fit the base; the model is as it was.
        MethodError: several adapters have no sum.
        StateError: the model's adapter is merged.
    """
    several = _adapters(adapters)
    if attached(model) is not None:
        require(model, "switch")
    here = Fingerprint.of(model)
    for a in several:
        _check_base(model, a, here, "the adapter", force=force)
    chosen = several[0] if len(several) == 1 else stacked(several, model) if several else None
    if attached(model) is not None:
        detach(model)
    if chosen is not None:
        _install(model, chosen, here, trainable=False)
    return model


def _adapters(adapters: Any) -> list[Adapter]:
    """A list of them, whichever way they were given.

    Raises:
        FileError: something among them is no adapter.
    """
    alone = isinstance(adapters, (Adapter, str, PathLike)) or not isinstance(adapters or (), Iterable)
    several = [adapters] if alone else list(adapters or ())
    fix = "read one with lorary.Adapter.load(path)"
    wrong = [Problem(repr(a), "is no adapter", fix) for a in several if not isinstance(a, Adapter)]
    if wrong:
        raise FileError("cannot switch to these:", wrong)
    return several


def _check_base(model: nn.Module, adapter: Adapter, here: Fingerprint, where: str, *, force: bool) -> None:
    modules = plain_modules(model)
    problems = [problem for p in adapter.placed for problem in mismatch(p.site, modules.get(p.site.name))]
    given_up = {name for name, layer in adapted(model).items() if layer.start}  # detaching makes them plain
    for p in adapter.placed:
        if p.starts and is_packed(modules.get(p.site.name)) and p.site.name not in given_up:
            problems.append(packed_already(p.site.name, cast(Init, p.method.init)))
        problems += _shape_problems(p.site.name, p.stored, adapter.tensors.get(p.site.name, {}))
    parameters = {name: tuple(t.shape) for name, t in base_parameters(model)}
    for name, tensor in adapter.full.items():
        if parameters.get(name) != tuple(tensor.shape):
            found = f"it is {parameters[name]}" if name in parameters else "it has no such parameter"
            problems.append(Problem(name, f"the adapter holds {tuple(tensor.shape)} for it; in this model {found}"))
    if not force:
        fix = "load the base that it was trained on, or say force=True"
        problems += [Problem(p.where, p.what, fix) for p in adapter.base.disagreements(here)]
    if problems:
        raise FileError(f"{where} does not fit this model:", problems)


def _shape_problems(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> list[Problem]:
    shapes = {role: tuple(t.shape) for role, t in found.items()}
    return [
        Problem(name, f"{role} is {shapes.get(role, 'missing')}, expected {expected.get(role, 'no such tensor')}")
        for role in sorted(expected.keys() | shapes.keys())
        if expected.get(role) != shapes.get(role)
    ] + [Problem(name, what) for role, t in found.items() if (what := _unusable(role, t))]


def _unusable(role: str, tensor: Tensor) -> str:
    if tensor.is_meta:
        return f"{role} has no values: it is on the meta device"
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"{role} is a {tensor.layout} tensor of {tensor.dtype}, expected a dense one of floating-point numbers"
    return ""


def _install(model: nn.Module, adapter: Adapter, here: Fingerprint, *, trainable: bool, pack: bool = True) -> None:
    full = {name: tuple(value.shape) for name, value in adapter.full.items()}
    packed = packable(model, adapter.method.storage, full) if pack else []
    warn_of_packing(plain_modules(model), adapter.method.storage)
    place(model, adapter.method, adapter.placed, full, adapter.tensors, base=here, packed=packed)
    with torch.no_grad():
        for name, value in adapter.full.items():
            base_parameter(model, name).copy_(value)
    if not trainable:
        model.requires_grad_(False)


def stacked(adapters: Sequence[Adapter], model: nn.Module, weights: Sequence[float] | None = None) -> Adapter:
    """The weighted sum of adapters' updates as one adapter: exact, by stacking their factors along the rank.

    Args:
        adapters: any methods whose update is B A and nothing more.
        model: the base, for the values of parameters that some of them trained in full.
        weights: one for each; 1 where silent. Where all were trained on a base packed in one way, so is the sum's.

    Raises:
        MethodError: one of them is no plain sum (gains, shifts).
    """
    weights = weights or [1.0] * len(adapters)
    storage = adapters[0].method.storage if len({a.method.storage for a in adapters}) == 1 else AsIs()
    factors: dict[str, list[LowRankForm]] = {}
    sites: dict[str, Placed] = {}
    problems: dict[str, Problem] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for p in adapter.placed:
            sites.setdefault(p.site.name, p)
        for name, form in adapter.low_rank(model).items():
            if form.gain is not None or form.shift is not None:
                problems[name] = Problem(name, "one of them gives its output a gain or a shift of its own")
            factors.setdefault(name, []).append(LowRankForm(w * form.B, form.A))
    if problems:
        raise MethodError("these adapters have no sum:", problems.values())
    full = _summed_full(adapters, weights, model)
    placed, tensors = [], {}
    for name, forms in factors.items():
        B, A = torch.cat([f.B for f in forms], 1), torch.cat([f.A for f in forms], 0)
        site = dataclasses.replace(sites[name].site, parts=())  # the parts are in B's zeros now
        placed.append(Placed(site, _plain(A.shape[0], storage)))
        tensors[name] = {"A": A, "B": B}
    method = _plain(max(p.r for p in placed), storage) if placed else Method(full=tuple(full))
    return Adapter(method, tuple(placed), tensors, full, adapters[0].base)


def _plain(r: int, storage: Storage) -> Method:
    """LoRA of rank r whose scale is in B already."""
    return Method(LowRank(r), Kaiming(), Fixed(1.0), Add(), storage=storage)


def _summed_full(adapters: Sequence[Adapter], weights: Sequence[float], model: nn.Module) -> dict[str, Tensor]:
    """Fully trained parameters: the base's value and the weighted changes that the adapters made to it."""
    state = attached(model)
    total: dict[str, Tensor] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        for name, value in adapter.full.items():
            kept = state.full.get(name) if state is not None else None
            before = (kept if kept is not None else base_parameter(model, name).detach()).float().cpu()
            total[name] = total.get(name, before) + w * (value.float() - before)
    return {name: value.to(base_parameter(model, name).dtype) for name, value in total.items()}
