"""Method: the record of words that a method of the family is, checked as a whole when it is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from lorary import _deprecated
from lorary._deprecated import warn
from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.spec.context import Context
from lorary.spec.fields import POSITIVE, field_errors
from lorary.spec.interfaces import COMPONENTS, Delta, Init, Join, Rule, Scale, Storage, Unquantized


@dataclass(frozen=True)
class Method:
    """The record of words that is a method.

    Args:
        delta: what is learnt, or None where only base parameters train (BitFit, full fine-tuning).
        init, scale, join: where the delta starts, its size, how it joins the weight; None without a delta.
        frozen: roles that do not train.
        lr: role -> multiplier of the learning rate; 1 where silent.
        rules: what happens while training.
        storage: how the frozen weight is kept.
        full: patterns over base parameters that train in full, and over modules that hold them (whole-component
            names or globs).
        dropout: probability with which the adapter's input is dropped in training, before A.
        context: how far the model reads, and how its tokens see each other in training; None: as the base does.

    Raises:
        MethodError: every contradiction between the words, each with its reason.
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
        rates = self.lr.items() if isinstance(self.lr, Mapping) else self.lr
        frozen = frozenset([self.frozen] if isinstance(self.frozen, str) else self.frozen)
        own = getattr(self.delta, "role_aliases", {})  # presets speak of A and B, whatever a delta calls them
        object.__setattr__(self, "lr", tuple(sorted((own.get(str(role), str(role)), rate) for role, rate in rates)))
        object.__setattr__(self, "frozen", frozenset(own.get(role, role) for role in frozen))
        object.__setattr__(self, "rules", tuple(self.rules) if isinstance(self.rules, Iterable) else (self.rules,))
        object.__setattr__(self, "full", (self.full,) if isinstance(self.full, str) else tuple(self.full))
        problems = self._component_problems()
        agreed = not problems  # the words are words: now whether they agree
        problems += self._own_problems()
        if agreed:
            problems += self._delta_problems() if self.delta else self._bare_problems()
        if problems:
            raise MethodError("invalid method:", problems)

    @property
    def roles(self) -> frozenset[str]:
        """The names of all tensors of a site."""
        return (self.delta.roles if self.delta else frozenset()) | (self.join.roles if self.join else frozenset())

    @property
    def trained(self) -> frozenset[str]:
        """The names of the tensors of a site that train."""
        return self.roles - self.frozen - (self.delta.fixed_roles if self.delta else frozenset())

    def rate(self, role: str) -> float:
        """The learning-rate multiplier of a role."""
        return dict(cast("tuple[tuple[str, float], ...]", self.lr)).get(role, 1.0)

    def replace(self, **words: Any) -> Method:
        """The method with some components changed."""
        unknown = set(words) - set(AXES)
        if unknown:
            raise MethodError(
                "invalid method:",
                [Diagnostic(name, "is not an axis of a method", did_you_mean(name, AXES)) for name in sorted(unknown)],
            )
        return dataclasses.replace(self, **words)

    def but(self, **words: Any) -> Method:
        """Deprecated: use `replace`."""
        warn("Method.but", "Method.replace")
        return self.replace(**words)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data for a file: axis -> {"component": name, its fields} or a plain value."""
        return {
            "delta": _written(self.delta),
            "init": _written(self.init),
            "scale": _written(self.scale),
            "join": _written(self.join),
            "frozen": sorted(self.frozen),
            "lr": dict(cast("tuple[tuple[str, float], ...]", self.lr)),
            "rules": [_written(rule) for rule in self.rules],
            "storage": _written(self.storage),
            "full": list(self.full),
            "dropout": self.dropout,
        } | ({"context": _written(self.context)} if self.context else {})

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """The method that `to_dict` wrote.

        Raises:
            MethodError: unknown axes, components or fields, and every contradiction.
        """
        problems: list[Diagnostic] = []
        if not isinstance(data, Mapping):
            raise MethodError("invalid method record:", [Diagnostic("method", f"found {type(data).__name__}")])
        words = {}
        for axis, value in data.items():
            if axis not in AXES:
                problems.append(Diagnostic(str(axis), "is not an axis of a method", did_you_mean(str(axis), AXES)))
            else:
                words[axis] = _read_axis(axis, value, problems)
        if problems:
            raise MethodError("invalid method record:", problems)
        return Method(**words)

    def __str__(self) -> str:
        silent = {"frozen": frozenset(), "lr": (), "rules": (), "storage": Unquantized(), "full": (), "dropout": 0.0}
        lines = []
        for axis in AXES:
            value = getattr(self, axis)
            if value is None or silent.get(axis) == value:
                continue
            text = braces(value) if axis == "frozen" else value
            if axis in ("rules", "full"):
                text = ", ".join(map(str, value))
            if axis == "lr":
                text = ", ".join(f"{role} x{rate:g}" for role, rate in value)
            if axis == "scale" and self.delta is not None:
                text = f"{value} -> s = {value(self.delta.r):g}"
            lines.append(f"  {axis:<8} {text}")
        trains = [braces(self.trained)] if self.trained else []
        trains += [f"base parameters {', '.join(self.full)}"] if self.full else []
        return "\n".join(["Method", *lines, f"  trains   {' and '.join(trains)}"])

    def _component_problems(self) -> list[Diagnostic]:
        """Whether each axis holds a word of that axis, and each word's fields hold what they may."""
        problems = []
        for axis, value in [(axis, getattr(self, axis)) for axis in _PROTOCOLS] + [("rules", r) for r in self.rules]:
            if value is None and axis not in ("storage", "rules"):
                continue
            name = type(value).__name__
            fits = isinstance(value, _PROTOCOLS.get(axis, Rule))
            if axis == "scale" and isinstance(value, Init):  # which can be called as well
                fits = False
            if COMPONENTS.get(name) is not type(value) or not fits:
                problems.append(Diagnostic(axis, f"{value!r} is not a component of this axis"))
                continue
            problems += [Diagnostic(axis, what) for what in field_errors(value)]
        return problems

    def _own_problems(self) -> list[Diagnostic]:
        problems = []
        if "*" in self.full and not getattr(self.storage, "writable", True):
            what = f"{type(self.storage).__name__} keeps weights frozen, and `full` trains every one of them"
            problems.append(Diagnostic("storage", what))
        drop = self.dropout
        if isinstance(drop, bool) or not isinstance(drop, int | float) or not 0 <= drop < 1:
            problems.append(Diagnostic("dropout", f"{drop!r} is no probability in [0, 1)"))
        for role, rate in cast("tuple[tuple[str, float], ...]", self.lr):
            if not POSITIVE["check"](rate):
                problems.append(Diagnostic("lr", f"the multiplier of {role} is {rate!r}, not a positive number"))
        for pattern in self.full:
            if not isinstance(pattern, str) or not pattern:
                problems.append(Diagnostic("full", f"{pattern!r} is no pattern over parameter names"))
        return problems

    def _delta_problems(self) -> list[Diagnostic]:
        delta, init, join = self.delta, self.init, self.join
        missing = [axis for axis in ("init", "scale", "join") if getattr(self, axis) is None]
        if delta is None or init is None or join is None or missing:
            return [Diagnostic(axis, "is not said, and a delta needs it") for axis in missing]
        name = type(delta).__name__
        problems = []
        if init.fills != delta.roles - delta.fixed_roles:
            roles = braces(delta.roles - delta.fixed_roles)
            what = f"{type(init).__name__} fills {braces(init.fills)}; {name} has {roles}"
            problems.append(Diagnostic("init", what))
        problems += self._training_problems()
        if init.residual_init and not delta.arbitrary_factors:
            what = f"{type(init).__name__} starts B A at a part of W; the factors of {name} cannot be any matrices"
            problems.append(Diagnostic("init", what))
        if join.uses != delta.join_roles:
            uses, has = braces(join.uses), braces(delta.join_roles)
            what = f"{type(join).__name__} uses {uses} of a delta; {name} has {has}"
            problems.append(Diagnostic("join", what))
        if delta.shared - self.frozen:
            what = f"{braces(delta.shared - self.frozen)} of {name} belong to all sites and cannot train"
            problems.append(Diagnostic("frozen", what))
        if init.residual_init and self.dropout:
            what = f"{type(init).__name__} moves part of W into B A, and dropout would drop that part of W"
            problems.append(Diagnostic("dropout", what, "set dropout=0"))
        problems += self._storage_problems(delta, init)
        if self.dropout and not join.supports_dropout:
            what = f"{type(join).__name__} scales W x itself: there is no input of the adapter alone to drop from"
            problems.append(Diagnostic("dropout", what, "set dropout=0"))
        if delta.changes_bias and "bias" in self.full:
            what = f"{name} learns a change of every adapted layer's bias; trained in full, it would be learnt twice"
            problems.append(Diagnostic("full", what, "use one of the two"))
        if "*" in self.full:
            what = f"every base weight trains in full, which leaves nothing for {name} to learn"
            problems.append(Diagnostic("full", what, "use one of the two"))
        for rule in self.rules:
            problems += self._rule_problems(rule, name)
        return problems

    def _training_problems(self) -> list[Diagnostic]:
        """Whether what is frozen, and what has a rate of its own, are tensors that there are and that train."""
        problems = []
        if self.frozen - self.roles:
            what = f"{braces(self.frozen - self.roles)} cannot be frozen: the tensors are {braces(self.roles)}"
            problems.append(Diagnostic("frozen", what))
        idle = {role for role, _ in cast("tuple[tuple[str, float], ...]", self.lr)} - self.trained
        if idle:
            what = f"a learning rate for {braces(idle)}, but what trains is {braces(self.trained)}"
            problems.append(Diagnostic("lr", what))
        elif self.lr and len(self.trained) == 1:
            (role,) = self.trained
            what = f"{role} would learn faster or slower than nothing: {braces(self.frozen)} is frozen"
            problems.append(Diagnostic("lr", what, "give the rate itself, without a multiplier"))
        if not self.trained and not self.full:
            problems.append(Diagnostic("frozen", "everything is frozen: nothing would train"))
        return problems

    def _storage_problems(self, delta: Delta, init: Init) -> list[Diagnostic]:
        problems, name = [], type(self.storage).__name__
        if delta.needs_dense_weight and not self.storage.writable:
            what = f"{type(delta).__name__} takes W element by element in every step, and {name} keeps no dense W"
            problems.append(
                Diagnostic("storage", what, "set A to 'vector', 'scalar' or 'none', which act on the output")
            )
        if init.rounds > 1 and self.storage.writable:
            what = f"{type(init).__name__} starts {init.rounds} times at what packing loses, and {name} loses nothing"
            problems.append(Diagnostic("init", what, "set rounds=1, or add qlora"))
        elif init.rounds > 1 and not init.scale_free_start:
            what = f"{type(init).__name__} starts at s times what it finds, and in {init.rounds} rounds that would grow"
            problems.append(Diagnostic("init", what, "set divide=True"))
        return problems

    def _rule_problems(self, rule: Rule, delta: str) -> list[Diagnostic]:
        problems, name = [], type(rule).__name__
        if rule.needs - self.roles:
            what = f"{name} needs {braces(rule.needs - self.roles)}; {delta} has {braces(self.roles)}"
            problems.append(Diagnostic("rules", what))
        if rule.writes_base and not self.storage.writable:
            what = f"{name} writes the base weight, which {type(self.storage).__name__} cannot take"
            problems.append(Diagnostic("rules", what))
        return problems + ([] if problems else [Diagnostic("rules", what) for what in rule.problems(self)])

    def _bare_problems(self) -> list[Diagnostic]:
        problems = []
        for axis in ("init", "scale", "join", "frozen", "lr", "rules", "dropout"):
            if getattr(self, axis):
                problems.append(Diagnostic(axis, "makes sense for a delta only, and this method has none"))
        if not self.full:
            problems.append(Diagnostic("full", "there is neither a delta nor a base parameter that trains"))
        return problems


_PROTOCOLS: dict[str, Any] = {
    "delta": Delta,
    "init": Init,
    "scale": Scale,
    "join": Join,
    "storage": Storage,
    "context": Context,
}
AXES: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Method))


def braces(names: Iterable[str]) -> str:
    """Names as a set is written: {A, B}."""
    return "{" + ", ".join(sorted(map(str, names))) + "}"


def _written(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    fields = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
    told = {f.name: content for f, content in fields.items() if content != f.default or "later" not in f.metadata}
    return {"component": type(value).__name__} | told


def _read_axis(axis: str, value: Any, problems: list[Diagnostic]) -> Any:
    if axis in _PROTOCOLS:
        return None if value is None and axis != "storage" else _read_component(axis, value, problems)
    plain: dict[str, tuple[type, ...]] = {"frozen": (list,), "rules": (list,), "full": (list,), "lr": (dict,)}
    fits = isinstance(value, plain.get(axis, (int, float)))
    if not fits:
        expected = " or ".join(t.__name__ for t in plain.get(axis, (int, float)))
        problems.append(Diagnostic(axis, f"expected {expected}, found {type(value).__name__}"))
        return getattr(_DEFAULT, axis)
    if axis in ("frozen", "full") and not all(isinstance(name, str) for name in value):
        problems.append(Diagnostic(axis, f"expected names, found {value!r}"))
        return getattr(_DEFAULT, axis)
    if axis == "rules":
        return tuple(_read_component(f"rules[{i}]", rule, problems) for i, rule in enumerate(value))
    return value


def _read_component(where: str, value: Any, problems: list[Diagnostic]) -> Any:
    if isinstance(value, Mapping) and "word" in value:
        value = _deprecated.current_component(value)
    name = value.get("component") if isinstance(value, Mapping) else None
    cls = COMPONENTS.get(name) if isinstance(name, str) else None
    if cls is None:
        said = value if name is None else name
        problems.append(
            Diagnostic(where, f"{said!r} is not a known component", did_you_mean(str(said), list(COMPONENTS)))
        )
        return None
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "component"}
    known = {f.name for f in dataclasses.fields(cls)}
    for key in sorted(set(fields) - known):
        problems.append(Diagnostic(where, f"{name} has no field `{key}`", did_you_mean(key, sorted(known))))
    try:
        return cls(**{k: v for k, v in fields.items() if k in known})
    except TypeError as error:  # a field without a default is missing
        problems.append(Diagnostic(where, str(error).partition("__init__() ")[2] or str(error)))
        return None


_DEFAULT = Method(full=("*",))
