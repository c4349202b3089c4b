"""Methods as plain data, which files hold, and as text.

`method` is a `Method`, whose module imports this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lorary._deprecated import current_component
from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.spec._checks import PROTOCOLS, braces
from lorary.spec.interfaces import COMPONENTS, Unquantized

_PLAIN: dict[str, tuple[type, ...]] = {"frozen": (list,), "rules": (list,), "full": (list,), "lr": (dict,)}


def write(method: Any) -> dict[str, Any]:
    """The record of a method: axis -> {"component": name, its fields} or a plain value."""
    return {
        "delta": _write_component(method.delta),
        "init": _write_component(method.init),
        "scale": _write_component(method.scale),
        "join": _write_component(method.join),
        "frozen": sorted(method.frozen),
        "lr": method.rates,
        "rules": [_write_component(rule) for rule in method.rules],
        "storage": _write_component(method.storage),
        "full": list(method.full),
        "dropout": method.dropout,
    } | ({"context": _write_component(method.context)} if method.context else {})


def _write_component(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    fields = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
    written = {f.name: content for f, content in fields.items() if content != f.default or "later" not in f.metadata}
    return {"component": type(value).__name__} | written


def read(data: Any, axes: Iterable[str]) -> dict[str, Any]:
    """axis -> component or plain value, from the record of a method.

    Raises:
        MethodError: unknown axes, components or fields.
    """
    if not isinstance(data, Mapping):
        raise MethodError("invalid method record:", [Diagnostic("method", f"found {type(data).__name__}")])
    problems: list[Diagnostic] = []
    components = {}
    for axis, value in data.items():
        if axis in axes:
            components[axis] = _read_axis(axis, value, problems)
        else:
            problems.append(unknown_axis(str(axis), axes))
    if problems:
        raise MethodError("invalid method record:", problems)
    return components


def unknown_axis(name: str, axes: Iterable[str]) -> Diagnostic:
    """The error of a name that is not an axis."""
    return Diagnostic(name, "is not an axis of a method", did_you_mean(name, axes))


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
        problems.append(
            Diagnostic(where, f"{shown!r} is not a known component", did_you_mean(str(shown), list(COMPONENTS)))
        )
        return None
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "component"}
    known = {f.name for f in dataclasses.fields(cls)}
    for key in sorted(set(fields) - known):
        problems.append(Diagnostic(where, f"{name} has no field `{key}`", did_you_mean(key, sorted(known))))
    try:
        return cls(**{k: v for k, v in fields.items() if k in known})
    except TypeError as error:  # a required field is missing
        problems.append(Diagnostic(where, str(error).partition("__init__() ")[2] or str(error)))
        return None


def as_text(method: Any, axes: Iterable[str]) -> str:
    """A method as lines of text: the axes that differ from their defaults, and what trains."""
    shown: dict[str, Any] = {axis: getattr(method, axis) for axis in axes}
    if method.delta and method.scale:
        shown["scale"] = f"{method.scale} -> s = {method.scale(method.delta.r):g}"
    shown |= {
        "frozen": method.frozen and braces(method.frozen),
        "lr": ", ".join(f"{role} x{rate:g}" for role, rate in method.rates.items()),
        "rules": ", ".join(map(str, method.rules)),
        "storage": None if method.storage == Unquantized() else method.storage,
        "full": ", ".join(method.full),
    }
    trains = [braces(method.trained)] if method.trained else []
    trains += [f"base parameters {', '.join(method.full)}"] if method.full else []
    lines = [f"  {axis:<8} {value}" for axis, value in shown.items() if value]
    return "\n".join(["Method", *lines, f"  trains   {' and '.join(trains)}"])
