"""The configuration explained: a commented YAML template, and the JSON schema with which editors complete."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from lorary.spec.presets import presets
from lorary.train.config._aliases import SHORTHAND
from lorary.train.config._other_tools import CANONICAL_AT_TOP, PRESET_OF
from lorary.train.config.config import SECTIONS, Config
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump

_START = {"id": "builtin:base", "train": "builtin:docstrings", "validation": "builtin:docstrings"}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def template() -> str:
    """YAML with every key, its default and its description; it runs as it is, offline.

    >>> template().splitlines()[0]
    '# One training run. Try it with: lorary train THIS_FILE --dry-run'
    """
    start = {"model": _START["id"], "data": {"train": _START["train"], "validation": _START["validation"]}}
    defaults = from_dict(start).resolve()
    lines = [
        "# One training run. Try it with: lorary train THIS_FILE --dry-run",
        "# Keys after a `#` have their default.",
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
    schema: dict[str, Any] = _standard(Config.model_json_schema())
    top = schema["properties"]
    sections = {name: schema["$defs"][f"{name.capitalize()}Section"]["properties"] for name in SECTIONS if name}
    for preset in presets().values():
        for key, default in preset.parameters.items():
            option = {"description": f"option of {preset.name}; default {json.dumps(default, default=str)}"}
            sections["method"].setdefault(key, option)
    for alias, target in CANONICAL_AT_TOP.items():
        top[alias] = {"description": f"another name of {target}", "deprecated": True}
        section = target.rpartition(".")[0]
        (sections[section] if section else top).setdefault(alias, top[alias])
    for switch, preset_name in PRESET_OF.items():
        flag = {"type": "boolean", "description": f"adds {preset_name} to method.name", "deprecated": True}
        top[switch] = sections["method"][switch] = flag
    for name, key in SHORTHAND.items():
        top[name] = {"anyOf": [top[name], sections[name][key]], "description": f"the section, or {name}.{key} alone"}
    schema["required"] = []  # other tools' names can set all of them
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def _standard(schema: Any) -> Any:
    """The schema with JSON schema's names of bounds, where pydantic keeps its own for bounds around a converter."""
    if isinstance(schema, list):
        return [_standard(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(key, key): _standard(value) for key, value in schema.items()}
