"""pydantic's complaints in the user's words, at the place where the value was written."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lorary.errors import Diagnostic, did_you_mean, suggestion
from lorary.train.config.aliases import NormalisedConfig, show
from lorary.train.config.config import DropSection
from lorary.train.config.yaml_source import Place

_EXAMPLES: dict[Place, str] = {
    ("model",): "model: builtin:base",
    ("model", "id"): "id: builtin:base",
    ("data",): "data: builtin:docstrings",
    ("data", "train"): "train: builtin:docstrings",
}
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ValidationError, read_: NormalisedConfig) -> list[Diagnostic]:
    """One problem per complaint, in the order of the fields."""
    return [_problem(dict(complaint), read_) for complaint in error.errors(include_url=False)]


def _problem(complaint: dict[str, Any], read_: NormalisedConfig) -> Diagnostic:
    place: Place = tuple(part for part in complaint["loc"] if part != "[key]")
    key = read_.spelt.get(place) or _dotted(place)
    kind, value, limits = complaint["type"], complaint["input"], complaint.get("ctx", {})
    where = read_.find(place)
    if kind == "missing":
        return Diagnostic(where, f"`{_dotted(place)}` is missing", f"for example `{_EXAMPLES[place]}`")
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return Diagnostic(where, f"`{key}` must be {words} {_limit(limits[name])}, not {show(value)}")
    if kind == "literal_error":
        return _choice(where, key, value, str(limits["expected"]))
    if kind == "extra_forbidden":  # in a section within a section; the others' keys have been looked at before
        known = list(DropSection.model_fields)
        return Diagnostic(
            where, f"unknown key `{place[-1]}` in `{_dotted(place[:-1])}`", did_you_mean(str(place[-1]), known)
        )
    if kind in ("too_short", "string_too_short"):
        return Diagnostic(where, f"`{key}` is empty")
    return Diagnostic(where, f"`{key}` must be {_KINDS[kind]}, not {show(value)}")


def _choice(where: str, key: str, value: object, expected: str) -> Diagnostic:
    words = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    hint = suggestion(value, words) if isinstance(value, str) else ""
    listed = ", ".join(f"`{word}`" for word in words)
    return Diagnostic(where, f"`{key}` must be one of {listed}, not {show(value)}", hint)


def _limit(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _dotted(place: Place) -> str:
    """`training.lr`, `method.targets[1]`, `method.ranks['*.q_proj']`."""
    parts = [f".{p}" if isinstance(p, str) and p.isidentifier() else f"[{p!r}]" for p in place]
    return "".join(parts).lstrip(".")
