"""The method: a record of components, one per axis, checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary._deprecated import warn
from lorary.errors import MethodError
from lorary.spec import _checks, _records
from lorary.spec._checks import braces as braces
from lorary.spec.context import Context
from lorary.spec.interfaces import Delta, Init, Join, Rule, Scale, Storage, Unquantized

# axis -> what a component of it decides
AXES = {
    "delta": "what is trained",
    "init": "where it starts",
    "scale": "its size",
    "join": "how it joins the weight",
    "frozen": "what stays frozen",
    "lr": "how fast each part learns",
    "rules": "what happens while training",
    "storage": "how the weight is stored",
    "full": "which base parameters train",
    "dropout": "dropout",
    "context": "how far it reads",
}


@dataclass(frozen=True)
class Method:
    """A method of the LoRA family: an immutable record of components.

    Args:
        delta: the trained update, or None if only base parameters train (BitFit, full fine-tuning).
        init, scale, join: the delta's start, its size, and how it joins the weight; None without a delta.
        frozen: roles that do not train.
        lr: role -> multiplier of the learning rate; 1 for all others.
        rules: changes to training.
        storage: how the frozen weights are stored.
        full: base parameters that train in full: patterns over their names and over modules (whole names or globs).
        dropout: the probability of dropping an input of A in training.
        context: the context length and the attention in training; None for the model's own.

    Raises:
        MethodError: every contradiction between the components, each with its reason.
    """

    delta: Delta | None = None
    init: Init | None = None
    scale: Scale | None = None
    join: Join | None = None
    frozen: frozenset[str] = frozenset()
    lr: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    rules: tuple[Rule, ...] = ()
    storage: Storage = field(default_factory=Unquantized)
    full: tuple[str, ...] = ()
    dropout: float = 0.0
    context: Context | None = None

    def __post_init__(self) -> None:
        frozen = [self.frozen] if isinstance(self.frozen, str) else self.frozen
        alias = getattr(self.delta, "role_aliases", {})  # presets refer to A and B, whatever the delta's own names
        values: dict[str, Any] = {
            "lr": tuple(sorted((alias.get(str(role), str(role)), rate) for role, rate in self.rates.items())),
            "frozen": frozenset(alias.get(role, role) for role in frozen),
            "rules": tuple(self.rules) if isinstance(self.rules, Iterable) else (self.rules,),
            "full": (self.full,) if isinstance(self.full, str) else tuple(self.full),
        }
        for axis, value in values.items():
            object.__setattr__(self, axis, value)
        if problems := _checks.contradictions(self):
            raise MethodError("invalid method:", problems)

    @property
    def roles(self) -> frozenset[str]:
        """The names of all tensors of a site."""
        return (self.delta.roles if self.delta else frozenset()) | (self.join.roles if self.join else frozenset())

    @property
    def trained(self) -> frozenset[str]:
        """The names of the trained tensors of a site."""
        return self.roles - self.frozen - (self.delta.fixed_roles if self.delta else frozenset())

    @property
    def rates(self) -> dict[str, float]:
        """role -> multiplier of the learning rate, where it is not 1."""
        return dict(self.lr)

    def rate(self, role: str) -> float:
        """The learning-rate multiplier of a role."""
        return self.rates.get(role, 1.0)

    def replace(self, **components: Any) -> Method:
        """The method with some components replaced."""
        if unknown := sorted(set(components) - set(AXES)):
            raise MethodError("invalid method:", [_records.unknown_axis(axis, AXES) for axis in unknown])
        return dataclasses.replace(self, **components)

    def but(self, **components: Any) -> Method:
        """Deprecated: use `replace`."""
        warn("Method.but", "Method.replace")
        return self.replace(**components)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data for a file: axis -> {"component": name, its fields} or a plain value."""
        return _records.write(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """The inverse of `to_dict`.

        Raises:
            MethodError: unknown axes, components or fields, and every contradiction.
        """
        return Method(**_records.read(data, AXES))

    def __str__(self) -> str:
        return _records.as_text(self, AXES)
