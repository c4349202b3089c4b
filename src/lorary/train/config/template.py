"""The configuration explained: a commented YAML to start from, and the JSON schema that editors complete with."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from lorary.spec.presets import presets
from lorary.train.config.aliases import CANONICAL_AT_TOP, PRESET_OF, SHORTHAND
from lorary.train.config.config import SECTIONS, Config
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump

_START = {"id": "builtin:base", "train": "builtin:docstrings", "validation": "builtin:docstrings"}
_LISTS = ("name", "targets", "exclude", "train", "validation", "report_to")  # where one text stands for the list of it


def template() -> str:
    """YAML that holds every key with its default and its meaning; it runs as it is, offline.

    >>> template().splitlines()[0]
    '# One training run. Try it with: lorary train THIS_FILE --dry-run'
    """
    start = {"model": _START["id"], "data": {"train": _START["train"], "validation": _START["validation"]}}
    defaults = from_dict(start).resolve()
    lines = [
        "# One training run. Try it with: lorary train THIS_FILE --dry-run",
        "# What a `#` stands before is the default.",
    ]
    for key, field in SECTIONS[""].items():
        lines.append("")
        if key in SECTIONS:
            section = getattr(defaults, key)
            lines.append(f"{key}:")
            for name, inner in SECTIONS[key].items():
                lines += _entry(name, inner, getattr(section, name), "  ")
        else:
            lines += _entry(key, field, getattr(defaults, key), "")
    return "\n".join(lines) + "\n"


def _entry(name: str, field: FieldInfo, default: Any, indent: str) -> list[str]:
    comment = textwrap.wrap(field.description or "", 96, initial_indent="# ", subsequent_indent="# ")
    if isinstance(default, tuple):
        default = default[0] if len(default) == 1 else list(default)
    written = "" if default is None else dump({name: default}).strip().partition(": ")[2]
    entry = f"{name}: {written}".rstrip()
    return [indent + line for line in (*comment, entry if name in _START else f"# {entry}")]


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a configuration file, other tools' names included."""
    schema: dict[str, Any] = Config.model_json_schema()
    sections = {name: schema["$defs"][f"{name.capitalize()}Section"] for name in SECTIONS if name}
    for section in sections.values():
        for key in set(_LISTS) & set(section["properties"]):
            section["properties"][key] = _or_text(section["properties"][key])
    _allow_presets_options(sections["method"])
    top = schema["properties"]
    for alias, to in CANONICAL_AT_TOP.items():
        home, _, key = to.rpartition(".")
        there = sections[home]["properties"] if home else top
        said = {"description": f"another name of {to}", "deprecated": True}
        top[alias] = said
        if home:
            there.setdefault(alias, said)
    for flag, preset in PRESET_OF.items():
        said = {"type": "boolean", "description": f"adds {preset} to method.name", "deprecated": True}
        top[flag] = sections["method"]["properties"][flag] = said
    for name, key in SHORTHAND.items():
        inner = sections[name]["properties"][key]
        top[name] = {"anyOf": [top[name], inner], "description": f"the section, or {name}.{key} alone"}
    schema["required"] = []  # a flat file names them otherwise
    schema = _standard(schema)
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def _standard(schema: Any) -> Any:
    """JSON schema's own words for bounds that stand outside a converter, where pydantic keeps its own."""
    if isinstance(schema, list):
        return [_standard(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    if schema.get("type") == "array":
        words["minLength"] = "minItems"
    return {words.get(key, key): _standard(value) for key, value in schema.items()}


def _or_text(schema: dict[str, Any]) -> dict[str, Any]:
    outer = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    return outer | {"anyOf": [{"type": "string"}, {k: v for k, v in schema.items() if k not in outer}]}


def _allow_presets_options(method: dict[str, Any]) -> None:
    for preset in presets().values():
        for key, default in preset.parameters.items():
            said = {"description": f"option of {preset.name}; default {json.dumps(default, default=str)}"}
            method["properties"].setdefault(key, said)
