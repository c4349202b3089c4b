"""Aliases: other tools' names of configuration keys, translated to lorary's.

The names of PEFT, TRL, LLaMA-Factory, Axolotl and Unsloth are understood in their section, and at the top level as in
those tools' flat files; every translation is noted. A key in the wrong section, and a key that cannot be translated,
are errors that say what to write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import Diagnostic, did_you_mean, nearest, suggestion
from lorary.train.config._other_tools import (
    CANONICAL,
    CANONICAL_AT_TOP,
    CONVERTED,
    HINTS,
    PRESET_OF,
    PRESET_OF_VALUE,
    VALUES,
)
from lorary.train.config.config import SECTIONS
from lorary.train.config.yaml_source import ParsedYaml, Place, nearest_mark

# section -> the key that a plain value in its place sets
SHORTHAND = {"model": "id", "method": "name", "data": "train", "compare": "methods"}


@dataclass
class NormalisedConfig:
    """A configuration under lorary's own names, with its sources and notes.

    Args:
        tree: section -> key -> value.
        where: place of a key -> position of its value in the source.
        spelt: place of a key -> its name in the source.
        switches: (key, position, value, preset to add); `apply_switches` applies them.
        notes: every translation.
        problems: every mistake.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    where: dict[Place, str] = field(default_factory=dict)
    spelt: dict[Place, str] = field(default_factory=dict)
    switches: list[tuple[str, str, Any, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)

    def find(self, place: Place) -> str:
        """The position of `place`, or of the nearest key around it."""
        return nearest_mark(self.where, place)


def normalise(source: ParsedYaml, options: frozenset[str]) -> NormalisedConfig:
    """`source` under lorary's names; `options` are the presets' parameters, allowed under `method`."""
    return _Translation(source, options).run()


def apply_switches(config: NormalisedConfig) -> None:
    """Add the presets of switches such as `use_rslora: true` to `method.name`."""
    for switch, where, value, preset in config.switches:
        shown = value if isinstance(value, str) else show(value)
        effect = (
            "changes nothing here"
            if not preset
            else f"{'adds' if value else 'does not add'} `{preset}` to `method.name`"
        )
        config.notes.append(f"`{switch}: {shown}` {effect}")
        names = config.tree.setdefault("method", {}).get("name", ["lora"])
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        if value and preset and isinstance(names, list) and preset not in names:
            config.tree["method"]["name"] = [*names, preset]
            place = ("method", "name", len(names))
            config.where[place], config.spelt[place] = where, switch


class _Translation:
    def __init__(self, source: ParsedYaml, options: frozenset[str]) -> None:
        self.source, self.options, self.out = source, options, NormalisedConfig()

    def run(self) -> NormalisedConfig:
        tree = self.source.tree
        if not isinstance(tree, dict):
            what = "it is empty" if tree is None else f"it holds {show(tree)}, not keys and values"
            self._problem((), what, "`lorary init` writes one to start from")
            return self.out
        self.out.where[()] = self.source.where(())
        for key, value in tree.items():
            if key in SECTIONS and isinstance(value, dict | None):  # a section may be empty
                self.out.where[(key,)] = self.source.where((key,))
                self.out.tree.setdefault(key, {})
                for inner, inner_value in (value or {}).items():
                    self._key(key, inner, inner_value, (key, inner))
            elif key in SHORTHAND and not isinstance(value, dict):
                self._set(f"{key}.{SHORTHAND[key]}", value, (key,), key)
            else:
                self._key("", key, value, (key,))
        return self.out

    def _key(self, section: str, key: str, value: Any, place: Place) -> None:
        target = (CANONICAL if section else CANONICAL_AT_TOP).get(key)
        if section == "method" and key == "options" and isinstance(value, dict):
            for name, option in value.items():
                self._option(name, option, (*place, name))
        elif key in SECTIONS.get(section, {}):
            self._set(f"{section}.{key}" if section else key, value, place, key)
        elif key in PRESET_OF and section in ("", "method", "model"):
            if isinstance(value, bool):
                self.out.switches.append((key, self.source.where(place), value, PRESET_OF[key]))
            else:
                self._problem(place, f"`{key}` must be true or false, not {show(value)}")
        elif self._is_value_of_preset(key, value) and section in ("", "method", "model", "training"):
            self.out.switches.append((key, self.source.where(place), value, PRESET_OF_VALUE[key][value]))
        elif target is not None and (not section or target.startswith(f"{section}.")):
            self._translate(key, target, value, place)
        elif section == "method" and key in self.options:
            self._option(key, value, place)
        else:
            what = f"unknown key `{key}`" + (f" in `{section}`" if section else "")
            fix = HINTS.get(key) or _right_section(key) or _nearest_key(section, key, self.options)
            self._problem(place, what, fix)

    @staticmethod
    def _is_value_of_preset(key: str, value: Any) -> bool:
        values = PRESET_OF_VALUE.get(key, {})
        return any(value == known and type(value) is type(known) for known in values)

    def _translate(self, alias: str, target: str, value: Any, place: Place) -> None:
        values = VALUES.get(alias, {})
        translated = isinstance(value, str | bool) and value in values
        if True in values and not translated:
            self._problem(place, f"`{alias}` must be true or false, not {show(value)}")
        elif alias == "warmup_ratio" and isinstance(value, int | float) and value >= 1:
            self._problem(place, f"`warmup_ratio` is a share of the steps and must be below 1, not {show(value)}")
        else:
            read = values[value] if translated else CONVERTED.get(alias, lambda unchanged: unchanged)(value)
            if self._set(target, read, place, alias):
                shown = f": {read if isinstance(read, str) else ', '.join(read)}" if read != value else ""
                self.out.notes.append(f"`{alias}` is read as `{target}{shown}`")

    def _set(self, key: str, value: Any, place: Place, spelt: str) -> bool:
        path = tuple(key.split(".", 2))
        if path in self.out.where:
            what = f"`{spelt}` and `{self.out.spelt[path]}` ({self.out.where[path]}) both set `{key}`"
            self._problem(place, what, "keep one of the two")
            return False
        if len(path) == 1 and path[0] in SECTIONS:
            self._problem(place, f"`{key}` must hold keys and values, not {show(value)}")
            return False
        target = self.out.tree
        for part in path[:-1]:
            target = target.setdefault(part, {})
        if not isinstance(target, dict):  # `options: text`, which validation reports
            return False
        target[path[-1]] = value
        self.out.where[path], self.out.spelt[path] = self.source.where(place), spelt
        for inner, mark in self.source.marks.items():
            if inner[: len(place)] == place and len(inner) > len(place):
                self.out.where[(*path, *inner[len(place) :])] = mark
        return True

    def _option(self, name: str, value: Any, place: Place) -> None:
        if name in self.options:
            self._set(f"method.options.{name}", value, place, name)
        else:
            hint = did_you_mean(name, sorted(self.options)) if self.options else ""
            self._problem(place, f"`{name}` is not an option of any method", hint)

    def _problem(self, place: Place, what: str, fix: str = "") -> None:
        self.out.problems.append(Diagnostic(self.source.where(place), what, fix))


def _right_section(key: str) -> str:
    """A hint for a key in the wrong section."""
    if homes := [name for name, keys in SECTIONS.items() if key in keys]:
        return " or ".join(f"it belongs under `{name}:`" if name else "it belongs at the top level" for name in homes)
    home, _, name = CANONICAL.get(key, "").rpartition(".")
    place = f"under `{home}:`" if home else "at the top level"
    return f"it belongs {place}, as `{name}`" if name else ""


def _nearest_key(section: str, key: str, options: Collection[str]) -> str:
    """A hint for a mistyped key: the nearest word of this section, or else of another one, or a preset's option."""
    here = {name: name for name in SECTIONS.get(section, {})}
    here |= {
        alias: key.rpartition(".")[2] for alias, key in CANONICAL.items() if section and key.startswith(f"{section}.")
    }
    if near := _near(key, here):
        return f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    homes = {name: f"{home}.{name}" for home, keys in SECTIONS.items() if home for name in keys}
    homes |= {alias: home for alias, home in CANONICAL.items() if "." in home}
    if near := _near(key, homes):
        home, _, name = near[0].partition(".")
        return f"did you mean `{name}`, under `{home}:`?"
    option = suggestion(key, options) if section == "method" else ""
    return option or f"known: {', '.join(sorted(SECTIONS[section]))}"


def _near(word: str, known: Mapping[str, str]) -> list[str]:
    """The canonical names of the known words nearest to a mistyped one, each once."""
    return list(dict.fromkeys(known[name] for name in nearest(word, known, cutoff=0.7)))


def show(value: Any) -> str:
    """A value as it would be written, shortened."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, str | int | float):
        text = f"the text {value!r}" if isinstance(value, str) else f"{value}"
        return text if len(text) <= 60 else text[:57] + "..."
    kinds: dict[type, str] = {dict: "keys and values", list: "a list", tuple: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")
