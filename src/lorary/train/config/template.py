"""The configuration explained: a commented YAML template, and the JSON schema with which editors complete."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from lorary.model.loading.source import Section
from lorary.spec.presets import presets
from lorary.train.config._aliases import SHORTHAND
from lorary.train.config._other_tools import CANONICAL_AT_TOP, PRESET_OF
from lorary.train.config.config import SECTIONS, Config
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump

_START = {"model": "builtin:base", "data": {"train": "builtin:docstrings", "validation": "builtin:docstrings"}}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def template(config: Config | None = None, reasons: Mapping[str, str] | None = None) -> str:
    """YAML with every key, its default and its description; it runs as it is, offline.

    Args:
        config: whose values to write; None for a start on the built-in model and data.
        reasons: dotted key -> why its value was chosen.

    >>> template().splitlines()[0]
    '# One training run. Try it with: lorary train THIS_FILE --dry-run'
    """
    config = from_dict(_START) if config is None else config
    defaults, reasons = config.resolve(), reasons or {}
    lines = [
        "# One training run. Try it with: lorary train THIS_FILE --dry-run",
        "# Keys after a `#` have their default.",
    ]
    for key, field in SECTIONS[""].items():
        lines.append("")
        if key in SECTIONS:
            section, given = getattr(defaults, key), getattr(config, key).model_fields_set
            lines.append(f"{key}:")
            for name, inner in SECTIONS[key].items():
                entry = _entry(name, inner, section, reasons.get(f"{key}.{name}", ""), active=name in given)
                lines += textwrap.indent("\n".join(entry), "  ").split("\n")
        else:
            lines += _entry(key, field, defaults, reasons.get(key, ""), active=key in config.model_fields_set)
    return "\n".join(lines) + "\n"


def _entry(name: str, field: FieldInfo, section: Section, reason: str, *, active: bool) -> list[str]:
    """The lines of one key: its description, the reason for its value, and the value, commented out at its default."""
    about = [field.description or "", *([f"-> {reason}"] if reason else [])]
    comment = [line for text in about for line in textwrap.wrap(text, 96, initial_indent="# ", subsequent_indent="# ")]
    value = section.model_dump(mode="json")[name]
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    written = dump({name: value}).strip().splitlines() if value is not None else [f"{name}:"]
    return [*comment, *(line if active and value is not None else f"# {line}" for line in written)]


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
