"""named_adapters: the adapters that a model holds under names, as a mapping."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import nn

from lorary.adapters._held import RANK, HeldAdapter, held_by, hold, padded_rank
from lorary.adapters._names import UnknownNameError, bad_name, unknown_name
from lorary.adapters.adapter import Adapter
from lorary.adapters.switch import activate, check_base
from lorary.errors import Diagnostic, FileError, MethodError, StateError
from lorary.layers.adapted import unwrapped_modules
from lorary.model.ambient import mode_independent
from lorary.model.base import Base
from lorary.model.checks import changeable
from lorary.model.fingerprint import Fingerprint
from lorary.model.state import require_attached, state_of


@mode_independent
def named_adapters(model: nn.Module, *, force: bool = False) -> NamedAdapters:
    """The adapters that a model holds under names, for `lorary.switch`: a mapping, and the model's own.

    `held["fr"] = adapter` copies an adapter to the devices of the model's layers; `held["fr"]` is a copy of its present
    values, training included; `del held["fr"]` drops it. Setting the name of an active adapter replaces it at once.
    The model holds them until they are dropped, through `switch`, `attach` and `detach`; a copy of the model and its
    pickle have copies of them; `state_dict` has the active one alone.

    Args:
        model: the base, with or without an adapter.
        force: accept adapters of another base, if every tensor fits.

    Raises:
        StateError: it is not a model that can hold adapters.

    Example:
        >>> held = lorary.named_adapters(model)
        >>> held["fr"] = lorary.load_adapter("runs/fr")
        >>> lorary.switch(model, "fr")
    """
    return NamedAdapters(changeable(model, "hold adapters"), force=force)


class NamedAdapters(MutableMapping[str, Adapter]):
    """name -> adapter, in the order in which they came; see `lorary.named_adapters`.

    Raises:
        StateError: a name is unknown (also a KeyError), or its adapter is in use.
        FileError: an adapter does not fit the model, or a name is not one. Nothing has changed then.
    """

    def __init__(self, model: nn.Module, *, force: bool = False) -> None:
        self._model, self._force = model, force

    @property
    def active(self) -> dict[str, float]:
        """name -> weight of the adapters that the model computes with; empty for the base, or an unnamed adapter."""
        state = state_of(self._model)
        return {} if state is None else {held.name: weight for held, weight in state.active.items()}

    @property
    def rank(self) -> int | None:
        """None, or the rank at which a switch to adapters that do not train attaches their sum, padded with zeros.

        Adapters of any methods, ranks and sites then have tensors of the same shapes, and a compiled model is not
        compiled again. A sum of a larger rank, or one that is not a LoRA, is attached as it is.
        """
        return padded_rank(self._model)

    @rank.setter
    def rank(self, rank: int | None) -> None:
        if rank is not None and (type(rank) is not int or rank < 1):
            what, fix = f"is {rank!r}", "use the sum of the ranks that are active at once, such as 64, or None"
            raise MethodError("invalid rank:", [Diagnostic("rank", what, fix)])
        object.__setattr__(self._model, RANK, rank)

    @mode_independent
    def rename(self, name: str, new: str) -> None:
        """Give an adapter another name; it stays active, and keeps its place."""
        held, mine = held_by(self._model), self._held(name)
        problems = bad_name(new)
        if not problems and new in held and new != name:
            problems = [Diagnostic(repr(new), "is the name of another adapter", "drop that one first")]
        if problems:
            raise FileError("cannot rename an adapter:", problems)
        renamed = {new if one is mine else one.name: one for one in held.values()}
        hold(self._model, renamed)
        mine.name = new

    def __getitem__(self, name: str) -> Adapter:
        return _value(self._model, self._held(name))

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        _hold(self._model, name, adapter, force=self._force)

    def __delitem__(self, name: str) -> None:
        dropped = self._held(name)
        if name in self.active:
            what, fix = "is active: the model computes with it", "lorary.switch(model, None), or to another one, first"
            raise StateError("cannot drop an adapter:", [Diagnostic(repr(name), what, fix)])
        hold(self._model, {key: one for key, one in held_by(self._model).items() if one is not dropped})

    def __iter__(self) -> Iterator[str]:
        return iter(list(held_by(self._model)))

    def __len__(self) -> int:
        return len(held_by(self._model))

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamedAdapters) and other._model is self._model

    __hash__ = None  # type: ignore[assignment]  # as of a dict

    def __repr__(self) -> str:
        return f"NamedAdapters({list(self)}, active={self.active})"

    def _held(self, name: Any) -> HeldAdapter:
        held = held_by(self._model)
        if not isinstance(name, str) or name not in held:
            raise UnknownNameError("no such adapter:", [unknown_name(str(name), held)])
        return held[name]


@mode_independent
def _value(model: nn.Module, held: HeldAdapter) -> Adapter:
    """The present values of a held adapter.

    Raises:
        StateError: they cannot be read now: it trains parameters in full, and the model is in a `disabled` block.
    """
    state = state_of(model)
    if state is not None and state.holder is held:
        if state.full:
            require_attached(model, "take from the model")
        held.keep(model, state)
    return held.copy()


@mode_independent
def _hold(model: nn.Module, name: str, adapter: Adapter, *, force: bool) -> None:
    """Hold an adapter under a name; in place of the one there, which may be active. All or nothing."""
    problems = bad_name(name)
    if not isinstance(adapter, Adapter):
        fix = "read one with lorary.load_adapter(path); lorary.Adapter.of(model) is the attached one"
        problems.append(Diagnostic(repr(name), f"a {type(adapter).__name__} is not an adapter", fix))
    if problems:
        raise FileError("cannot hold an adapter:", problems)
    held, state, here = held_by(model), state_of(model), Fingerprint.of(model)
    check_base(Base(model, here), adapter, f"the adapter {name!r}", force=force)
    before = held.get(name)
    if state is None or before is None or before not in state.active:
        hold(model, held | {name: _checked(name, adapter, model, here)})
        return
    require_attached(model, "replace an active adapter")
    if any(p.requires_grad for params in before.params.values() for p in params.values()):
        what, fix = "is being trained: an optimizer may hold its parameters", f"first lorary.switch(model, {name!r})"
        raise StateError("cannot replace an adapter:", [Diagnostic(repr(name), what, fix)])
    new = _checked(name, adapter, model, here)
    hold(model, held | {name: new})
    try:
        activate(model, {new if one is before else one: w for one, w in state.active.items()}, trainable=False)
    except BaseException:
        hold(model, held)
        raise


def _checked(name: str, adapter: Adapter, model: nn.Module, here: Fingerprint) -> HeldAdapter:
    """The held form of an adapter that was found to fit."""
    held = HeldAdapter(name, adapter, unwrapped_modules(model), held_by(model).values())
    held.checked = here
    return held
