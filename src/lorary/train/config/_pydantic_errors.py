"""pydantic's validation errors in the user's terms, at the position of the value in its source."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lorary.errors import Diagnostic, did_you_mean, suggestion
from lorary.model.loading.source import Section
from lorary.train.config._aliases import NormalisedConfig, show
from lorary.train.config._sections import AlsoSection
from lorary.train.config.compare_section import ArmSection
from lorary.train.config.drop import DropSection
from lorary.train.config.sources import Source
from lorary.train.config.yaml_source import Place

_EXAMPLES: dict[Place, str] = {
    ("model",): "model: builtin:base",
    ("model", "id"): "id: builtin:base",
    ("data",): "data: builtin:docstrings",
    ("data", "train"): "train: builtin:docstrings",
}
_ALSO = {"name": "name: vera", "targets": "targets: mlp", "method": "method: dora"}
_PARTS = ("[key]", "[path]", "[source]")  # pydantic's own parts of a place, which the user has not written
_SOURCE_KEYS = {"type": "format", "name": "subset", "data_files": "path", "ratio": "weight", "probability": "weight"}
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


def explain(error: ValidationError, config: NormalisedConfig) -> list[Diagnostic]:
    """One problem per validation error, in the order of the fields."""
    return [_problem(dict(details), config) for details in error.errors(include_url=False)]


def _problem(details: dict[str, Any], config: NormalisedConfig) -> Diagnostic:
    place: Place = tuple(part for part in details["loc"] if part not in _PARTS)
    kind, value, limits = details["type"], details["input"], details.get("ctx", {})
    dotted = _dotted(place)
    key, fix = config.spelt.get(place) or dotted, ""
    if kind == "missing":
        example = _EXAMPLES.get(place) or _ALSO.get(str(place[-1]), "path: rows.jsonl")
        what, fix = f"`{dotted}` is missing", f"for example `{example}`"
    elif kind in _BOUNDS:
        name, relation = _BOUNDS[kind]
        what = f"`{key}` must be {relation} {_limit(limits[name])}, not {show(value)}"
    elif kind == "literal_error":
        choices = [choice.strip("'") for choice in limits["expected"].replace(" or ", ", ").split(", ")]
        what = f"`{key}` must be one of {', '.join(f'`{choice}`' for choice in choices)}, not {show(value)}"
        fix = suggestion(value, choices) if isinstance(value, str) else ""
    elif kind == "extra_forbidden":  # in `also`, `drop` or a source: `normalise` has checked the other sections
        what = f"unknown key `{place[-1]}` in `{_dotted(place[:-1])}`"
        fix = _known_key(str(place[-1]), place)
    elif kind == "problem":  # of `lorary.train.config._fields`
        what, fix = f"`{key}` {limits['what']}", limits["fix"]
    elif kind in ("too_short", "string_too_short"):
        what = f"`{key}` is empty"
    else:
        what = f"`{key}` must be {_KINDS[kind]}, not {show(value)}"
    return Diagnostic(config.find(place), what, fix)


def _known_key(key: str, place: Place) -> str:
    """A hint for an unknown key of a source, where other tools' names are known, of `method.also` or `method.drop`."""
    in_source = place[0] == "data"
    if in_source and key in _SOURCE_KEYS:
        return f"write `{_SOURCE_KEYS[key]}`"
    sections: dict[str, type[Section]] = {"data": Source, "compare": ArmSection}
    section = sections.get(str(place[0])) or (AlsoSection if "also" in place else DropSection)
    return did_you_mean(key, section.model_fields)


def _limit(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _dotted(place: Place) -> str:
    """`training.lr`, `method.targets[1]`, `method.ranks['*.q_proj']`."""
    parts = [f".{p}" if isinstance(p, str) and p.isidentifier() else f"[{p!r}]" for p in place]
    return "".join(parts).lstrip(".")
