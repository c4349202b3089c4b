"""The method: a record of components, one per axis, checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary._deprecated import current_component, warn
from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.spec._checks import PROTOCOLS, contradictions
from lorary.spec._checks import braces as braces
from lorary.spec.context import Context
from lorary.spec.interfaces import COMPONENTS, Delta, Init, Join, Rule, Scale, Storage, Unquantized, has_rank

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
    "context": "what it reads",
}
# the types of the other axes in a file, where not numbers
_PLAIN: dict[str, tuple[type, ...]] = {"frozen": (list,), "rules": (list,), "full": (list,), "lr": (dict,)}


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
        if problems := contradictions(self):
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
            raise MethodError("invalid method:", [_unknown_axis(axis) for axis in unknown])
        return dataclasses.replace(self, **components)

    def but(self, **components: Any) -> Method:
        """Deprecated: use `replace`."""
        warn("Method.but", "Method.replace")
        return self.replace(**components)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data for a file: axis -> {"component": name, its fields} or a plain value."""
        return {
            "delta": _write_component(self.delta),
            "init": _write_component(self.init),
            "scale": _write_component(self.scale),
            "join": _write_component(self.join),
            "frozen": sorted(self.frozen),
            "lr": self.rates,
            "rules": [_write_component(rule) for rule in self.rules],
            "storage": _write_component(self.storage),
            "full": list(self.full),
            "dropout": self.dropout,
        } | ({"context": _write_component(self.context)} if self.context else {})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """The inverse of `to_dict`.

        Raises:
            MethodError: unknown axes, components or fields, and every contradiction.
        """
        return Method(**_read_components(data))

    def __str__(self) -> str:
        """Lines of text: the axes that differ from their defaults, and what trains."""
        shown: dict[str, Any] = {axis: getattr(self, axis) for axis in AXES}
        if self.delta and self.scale:
            shown["scale"] = f"{self.scale} -> s = {self.scale(self.delta.r):g}"
        if self.delta and not has_rank(self.delta):
            shown |= {"delta": None, "init": None, "scale": None}  # the join says it all
        shown |= {
            "frozen": self.frozen and braces(self.frozen),
            "lr": ", ".join(f"{role} x{rate:g}" for role, rate in self.rates.items()),
            "rules": ", ".join(map(str, self.rules)),
            "storage": None if self.storage == Unquantized() else self.storage,
            "full": ", ".join(self.full),
        }
        trains = [braces(self.trained)] if self.trained else []
        trains += [f"base parameters {', '.join(self.full)}"] if self.full else []
        lines = [f"  {axis:<8} {value}" for axis, value in shown.items() if value]
        return "\n".join(["Method", *lines, f"  trains   {' and '.join(trains)}"])


def _write_component(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    fields = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
    written = {
        f.name: content
        for f, content in fields.items()
        if "later" not in f.metadata or content != f.metadata.get("before", f.default)
    }
    return {"component": type(value).__name__} | written


def _read_components(data: Any) -> dict[str, Any]:
    """axis -> component or plain value, from the record of a method.

    Raises:
        MethodError: unknown axes, components or fields.
    """
    if not isinstance(data, Mapping):
        raise MethodError("invalid method record:", [Diagnostic("method", f"found {type(data).__name__}")])
    problems: list[Diagnostic] = []
    components = {}
    for axis, value in data.items():
        if axis in AXES:
            components[axis] = _read_axis(axis, value, problems)
        else:
            problems.append(_unknown_axis(str(axis)))
    if problems:
        raise MethodError("invalid method record:", problems)
    return components


def _unknown_axis(name: str) -> Diagnostic:
    """The error of a name that is not an axis."""
    return Diagnostic(name, "is not an axis of a method", did_you_mean(name, AXES))


def _read_axis(axis: str, value: Any, problems: list[Diagnostic]) -> Any:
    if axis in PROTOCOLS:
        return None if value is None and axis != "storage" else _read_component(axis, value, problems)
    expected = _PLAIN.get(axis, (int, float))
    fits = isinstance(value, expected)
    if not fits:
        names = " or ".join(t.__name__ for t in expected)
        problems.append(Diagnostic(axis, f"expected {names}, found {type(value).__name__}"))
    elif axis in ("frozen", "full") and not all(isinstance(name, str) for name in value):
        problems.append(Diagnostic(axis, f"expected names, found {value!r}"))
    elif axis == "rules":
        return tuple(_read_component(f"rules[{i}]", rule, problems) for i, rule in enumerate(value))
    return value


def _read_component(where: str, value: Any, problems: list[Diagnostic]) -> Any:
    if isinstance(value, Mapping) and "word" in value and "component" not in value:  # lorary 0.5 and before
        value = current_component(value)
    name = value.get("component") if isinstance(value, Mapping) else None
    cls = COMPONENTS.get(name) if isinstance(name, str) else None
    if cls is None:
        shown = value if name is None else name
        hint = did_you_mean("" if shown is None else str(shown), list(COMPONENTS))
        problems.append(Diagnostic(where, f"{shown!r} is not a known component", hint))
        return None
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "component"}
    known = {f.name for f in dataclasses.fields(cls)}
    for key in sorted(set(fields) - known):
        problems.append(Diagnostic(where, f"{name} has no field `{key}`", did_you_mean(key, sorted(known))))
    before = {f.name: f.metadata["before"] for f in dataclasses.fields(cls) if "before" in f.metadata}
    try:
        return cls(**before | {k: v for k, v in fields.items() if k in known})
    except TypeError as error:  # a required field is missing
        problems.append(Diagnostic(where, str(error).partition("__init__() ")[2] or str(error)))
        return None
