"""The checks of a method: every contradiction between its components.

`method` is a `Method`, whose module imports this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lorary.errors import Diagnostic
from lorary.spec.calibration import CalibratedInit
from lorary.spec.context import Context
from lorary.spec.fields import POSITIVE, field_errors
from lorary.spec.interfaces import COMPONENTS, Delta, Init, Join, Rule, Scale, Storage, all_in_join

# axis -> the protocol of its one component; a method may have several rules
PROTOCOLS: dict[str, Any] = {
    "delta": Delta,
    "init": Init,
    "scale": Scale,
    "join": Join,
    "storage": Storage,
    "context": Context,
}
_ONE_OF_TWO = "use one of the two"


def braces(names: Iterable[str]) -> str:
    """Names in set notation: {A, B}."""
    return "{" + ", ".join(sorted(map(str, names))) + "}"


def contradictions(method: Any) -> list[Diagnostic]:
    """The reasons why the values of a method's axes are invalid or contradict each other."""
    invalid = list(_component_problems(method))
    problems = [*invalid, *_value_problems(method)]
    if invalid:  # only valid components can be asked how they combine
        return problems
    return [*problems, *(_delta_problems(method, method.delta) if method.delta else _without_delta(method))]


def _component_problems(method: Any) -> Iterator[Diagnostic]:
    """The values that are not components of their axis, and the components' invalid fields."""
    for axis, value in [(axis, getattr(method, axis)) for axis in PROTOCOLS] + [("rules", r) for r in method.rules]:
        if value is None and axis not in ("storage", "rules"):
            continue
        fits = COMPONENTS.get(type(value).__name__) is type(value) and isinstance(value, PROTOCOLS.get(axis, Rule))
        if not fits or (axis == "scale" and isinstance(value, Init)):  # an init can be called as well
            yield Diagnostic(axis, f"{value!r} is not a component of this axis")
        else:
            yield from (Diagnostic(axis, what) for what in field_errors(value))


def _value_problems(method: Any) -> Iterator[Diagnostic]:
    dropout = method.dropout
    if "*" in method.full and not getattr(method.storage, "writable", True):
        what = f"{_name(method.storage)} weights are frozen, and `full` trains every weight"
        yield Diagnostic("storage", what)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        yield Diagnostic("dropout", f"{dropout!r} is not a probability in [0, 1)")
    for role, rate in method.rates.items():
        if not POSITIVE["check"](rate):
            yield Diagnostic("lr", f"the multiplier of {role} is {rate!r}, not a positive number")
    for pattern in method.full:
        if not isinstance(pattern, str) or not pattern:
            yield Diagnostic("full", f"{pattern!r} is not a pattern over parameter names")


def _without_delta(method: Any) -> Iterator[Diagnostic]:
    axes = ("init", "scale", "join", "frozen", "lr", "rules", "dropout")
    what = "has no effect: this method adapts no layer"
    yield from (Diagnostic(axis, what) for axis in axes if getattr(method, axis))
    if not method.full:
        yield Diagnostic("full", "nothing would train: there is no delta, and `full` is empty")


def _delta_problems(method: Any, delta: Delta) -> Iterator[Diagnostic]:
    init, join = method.init, method.join
    if init is None or join is None or method.scale is None:
        missing = [axis for axis in ("init", "scale", "join") if getattr(method, axis) is None]
        yield from (Diagnostic(axis, "is missing, and a delta needs it") for axis in missing)
        return
    yield from _init_problems(method, delta, init)
    yield from _training_problems(method, delta)
    yield from _join_problems(method, delta, join)
    yield from _storage_problems(method, delta, init)
    yield from _full_problems(method, delta)
    for rule in method.rules:
        yield from _rule_problems(method, rule, _name(delta))


def _init_problems(method: Any, delta: Delta, init: Init) -> Iterator[Diagnostic]:
    name = _name(delta)
    if init.fills != delta.roles - delta.fixed_roles:
        roles = braces(delta.roles - delta.fixed_roles)
        yield Diagnostic("init", f"{_name(init)} fills {braces(init.fills)}; {name} has {roles}")
    if (init.residual_init or isinstance(init, CalibratedInit)) and not delta.arbitrary_factors:
        source = "directions of the training data" if isinstance(init, CalibratedInit) else "a decomposition of W"
        what = f"{_name(init)} sets B and A to {source}, which the factors of {name} cannot hold"
        yield Diagnostic("init", what)
    if init.residual_init and method.dropout:
        what = f"{_name(init)} moves part of W into B A, and dropout would drop that part of W"
        yield Diagnostic("dropout", what, "set dropout=0")


def _join_problems(method: Any, delta: Delta, join: Join) -> Iterator[Diagnostic]:
    name = _name(join)
    if join.uses != delta.join_roles:
        what = f"{name} uses {braces(join.uses)} of a delta; {_name(delta)} has {braces(delta.join_roles)}"
        yield Diagnostic("join", what)
    if join.needs_context and method.context is None:
        yield Diagnostic("context", f"is missing: {name} takes effect through it", "name the preset")
    if not join.acts_everywhere and method.init.residual_init:
        what = f"{_name(method.init)} moves part of W into B A, and {name} adds B A to a part of the text alone"
        yield Diagnostic("init", what, "use another start")
    if not join.acts_everywhere and (writing := [_name(rule) for rule in method.rules if rule.writes_base]):
        what = f"{', '.join(writing)} writes W, and {name} leaves W as it is for a part of the text"
        yield Diagnostic("rules", what, _ONE_OF_TWO)
    if not join.adds_delta and delta.roles:
        yield Diagnostic("join", f"{name} adds no update to the weight, so {_name(delta)} would have no effect")
    if all_in_join(delta) and method.scale(delta.r) != 1:
        what = f"{method.scale} has no effect: {name} uses the tensors of {_name(delta)} without a scale"
        yield Diagnostic("scale", what, "set scale=ConstantScale(1.0)")
    if method.dropout and not join.adds_delta:
        yield Diagnostic("dropout", f"{name} adds no update whose input dropout could act on", "set dropout=0")
    elif method.dropout and not join.supports_dropout:
        what = f"{name} scales W x together with the update, so dropout cannot act on the update alone"
        yield Diagnostic("dropout", what, "set dropout=0")


def _training_problems(method: Any, delta: Delta) -> Iterator[Diagnostic]:
    """The frozen roles and learning rates that name no tensor, or none that trains."""
    if unknown := method.frozen - method.roles:
        what = f"{braces(unknown)} cannot be frozen: the tensors are {braces(method.roles)}"
        yield Diagnostic("frozen", what)
    if idle := set(method.rates) - method.trained:
        what = f"sets a learning rate for {braces(idle)}, but only {braces(method.trained)} trains"
        yield Diagnostic("lr", what)
    elif method.lr and len(method.trained) == 1:
        what = f"a learning-rate ratio has no effect: {braces(method.trained)} is the only trained tensor"
        yield Diagnostic("lr", what, "set the learning rate itself, without a multiplier")
    if not method.trained and not method.full:
        yield Diagnostic("frozen", "everything is frozen: nothing would train")
    if shared := delta.shared - method.frozen:
        what = f"{braces(shared)} of {_name(delta)} are shared by all layers and cannot train"
        yield Diagnostic("frozen", what)


def _storage_problems(method: Any, delta: Delta, init: Init) -> Iterator[Diagnostic]:
    storage = method.storage
    if delta.needs_dense_weight and not storage.writable:
        what = f"{_name(delta)} multiplies W element by element in every step, and {_name(storage)} keeps no dense W"
        yield Diagnostic("storage", what, "set A to 'vector', 'scalar' or 'none', which act on the output")
    if init.starts_at_error and storage.writable:
        what = f"{_name(init)} starts at the quantisation error, and {_name(storage)} has none"
        yield Diagnostic("init", what, "add qlora")
    elif init.rounds > 1 and storage.writable:
        what = f"{init.rounds} rounds of {_name(init)} correct the quantisation error, and {_name(storage)} has none"
        yield Diagnostic("init", what, "set rounds=1, or add qlora")
    elif init.rounds > 1 and not init.scale_free_start:
        what = f"{_name(init)} starts at s times a decomposition, which would grow by s in each of {init.rounds} rounds"
        yield Diagnostic("init", what, "set divide=True")


def _full_problems(method: Any, delta: Delta) -> Iterator[Diagnostic]:
    name = _name(delta)
    changes_bias = next((_name(c) for c in (delta, method.join) if c is not None and c.changes_bias), "")
    if changes_bias and "bias" in method.full:
        what = f"{changes_bias} trains an update of every adapted layer's bias, and `full` trains the biases themselves"
        yield Diagnostic("full", what, _ONE_OF_TWO)
    if "*" in method.full:
        what = f"every base weight trains in full, so {name if delta.roles else _name(method.join)} would be redundant"
        yield Diagnostic("full", what, _ONE_OF_TWO)


def _rule_problems(method: Any, rule: Rule, delta: str) -> Iterator[Diagnostic]:
    problems, name = [], _name(rule)
    if rule.needs - method.roles:
        problems.append(f"{name} needs {braces(rule.needs - method.roles)}; {delta} has {braces(method.roles)}")
    if rule.writes_base and not method.storage.writable:
        problems.append(f"{name} updates the base weight, and {_name(method.storage)} weights are frozen")
    yield from (Diagnostic("rules", what) for what in problems or rule.problems(method))


def _name(component: object) -> str:
    return type(component).__name__
