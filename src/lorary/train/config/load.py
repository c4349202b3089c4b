"""Configurations from files, dictionaries and the command line, with every mistake reported at once.

Precedence, lowest first: defaults, the file, `--set key=value` in the order given. The environment is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.errors import ConfigError, Diagnostic, MethodError, nearest
from lorary.spec.presets import presets
from lorary.train.config._aliases import NormalisedConfig, apply_switches, normalise
from lorary.train.config._paths import absolute
from lorary.train.config._pydantic_errors import explain
from lorary.train.config._sections import AlsoSection
from lorary.train.config._valid_part import ValidPart
from lorary.train.config.config import SECTIONS, Config, MethodSection
from lorary.train.config.conflicts import CHECKS
from lorary.train.config.yaml_source import ParsedYaml, Place, parse, read, scalar

Flags = Mapping[str, tuple[str, str]]  # name of a flag -> (dotted key, value)

_BY_KEY = (("method", "options"), ("method", "drop"))  # a later source changes these key by key
RESOLVED, MARK = "config.resolved.yaml", "run.json"  # in a run folder
_YAML = ("[", "{", "'", '"')  # any other value is taken literally: *.q_proj is not an alias


def load(path: str | Path, sets: Sequence[str] = (), flags: Flags | None = None) -> Config:
    """The configuration in the YAML file `path`, with the overrides `sets`, such as `training.lr=1e-4`.

    Args:
        path: the file. Files and folders that it names are looked for beside it, then in the working directory.
        sets: `key=value` each: a dotted key and a YAML value, in which globs need no quotes. Later overrides win over
            earlier ones and over the file.
        flags: options of a command, by their name, such as `{"--r": ("method.r", "8")}`; `sets` win over them.

    Raises:
        ConfigError: every mistake in the file and the overrides, each with file:line:column, the flag or `--set key`.
    """
    return _config([read(path), *_overrides(sets, flags)], str(path))


def from_dict(tree: Mapping[str, Any], sets: Sequence[str] = (), flags: Flags | None = None) -> Config:
    """The configuration in a dictionary, with the names and rules of a file.

    >>> from_dict({"model": "builtin:base", "data": "builtin:docstrings", "method": {"r": 8}}).method.r
    8

    Raises:
        ConfigError: every mistake, each with its dotted key.
    """
    marks: dict[Place, str] = {}
    return _config([ParsedYaml(_plain(tree, (), marks), marks), *_overrides(sets, flags)], "")


def read_method(method: Mapping[str, Any], max_length: int) -> MethodSection:
    """A section `method`, written as in a file.

    Args:
        method: its keys and values.
        max_length: tokens of a row, which the method's context must hold.

    Raises:
        ConfigError: every mistake.
    """
    data = {"train": "builtin:docstrings", "max_length": max_length}
    return from_dict({"model": "builtin:base", "data": data, "method": method}).method


def _plain(value: Any, place: Place, marks: dict[Place, str]) -> Any:
    """The value as plain dicts and lists; every place is marked with its dotted key."""
    marks[place] = ".".join(map(str, place))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*place, str(key)), marks) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*place, i), marks) for i, inner in enumerate(value)]
    return value


def _overrides(sets: Sequence[str], flags: Flags | None) -> list[ParsedYaml]:
    """One source per flag and per `key=value`.

    Raises:
        ConfigError: every malformed override, and every value that is not YAML.
    """
    sources: list[ParsedYaml] = []
    problems: list[Diagnostic] = []
    for flag, (key, value) in (flags or {}).items():
        sources += _override(key.split("."), value, flag, problems)
    for text in sets:
        key, equals, value = text.partition("=")
        keys = [part.strip() for part in key.split(".", 2)]
        where = f"--set {key.strip()}"
        if not equals or not all(keys):
            fix = "write --set section.key=value, such as --set training.lr=1e-4"
            problems.append(Diagnostic(f"--set {text}", "is not key=value", fix))
        elif len(keys) == 1 and keys[0] in SECTIONS and not value.strip():
            fix = f"name a key of it, such as --set {keys[0]}.{next(iter(SECTIONS[keys[0]]))}=VALUE"
            problems.append(Diagnostic(where, f"`{keys[0]}` is a section, and no value is given", fix))
        else:
            sources += _override(keys, value, where, problems)
    if problems:
        raise ConfigError("cannot read the overrides:", problems)
    return sources


def _override(keys: list[str], value: str, where: str, problems: list[Diagnostic]) -> list[ParsedYaml]:
    """The source of one override, or nothing if its value is not YAML."""
    try:
        tree = parse(value, where).tree if value.lstrip()[:1] in _YAML else scalar(value.strip())
    except ConfigError as error:
        problems += [Diagnostic(where, problem.what, problem.fix) for problem in error.problems]
        return []
    for part in reversed(keys):
        tree = {part: tree}
    return [ParsedYaml(tree, {tuple(keys[:i]): where for i in range(len(keys) + 1)})]


def _config(sources: Sequence[ParsedYaml], name: str) -> Config:
    options = frozenset(key for preset in presets().values() for key in preset.parameters) - set(SECTIONS["method"])
    parts = [normalise(source, options) for source in sources]
    if name:
        parts[0].tree = _with_paths(parts[0].tree, Path(name))
    found = _merged(parts)
    apply_switches(found)
    problems = list(found.problems)
    valid = ValidPart(found.tree)
    if valid.error is not None and (found.tree or not problems):
        problems += explain(valid.error, found)
    problems += _method_problems(valid, found) + _arm_problems(valid, found)
    for problem in valid.problems(*CHECKS):
        where = found.find(tuple(problem.where.split("."))) or name or "the configuration"
        problems.append(Diagnostic(where, f"`{problem.where}`: {problem.what}", problem.fix))
    if problems or valid.config is None or valid.error is not None:
        problems += [Diagnostic(found.find(place), what, fix) for place, what, fix in valid.missing_files()]
        headline = " ".join(filter(None, ("invalid configuration", name)))
        raise ConfigError(f"{headline}:", sorted(problems, key=_position))
    places = {".".join(map(str, place)): mark for place, mark in found.where.items() if len(place) == 2}
    return valid.config.with_notes(*found.notes).with_places(places)


def _with_paths(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tree of a file with the paths absolute that are beside it; a run's own configuration is for its folder."""
    if path.name == RESOLVED and (path.parent / MARK).is_file():
        tree = tree | {"output": str(path.parent)}
    return tree if path.parent.absolute() == Path.cwd() else absolute(tree, path.parent)


def _position(problem: Diagnostic) -> tuple[int, int, int]:
    """Sort key: line and column in the file, overrides last."""
    at = re.search(r":(\d+):(\d+)$", problem.where)
    return (0, int(at[1]), int(at[2])) if at else (1, 0, 0)


def _merged(parts: Sequence[NormalisedConfig]) -> NormalisedConfig:
    """Later parts over earlier ones: sections, preset options and LoRA-drop by key, everything else as a whole."""
    merged = NormalisedConfig()
    for part in parts:
        for key, value in part.tree.items():
            if not isinstance(value, dict):
                merged.tree[key] = value
                continue
            section = merged.tree.setdefault(key, {})
            for inner, new in value.items():
                before = section.get(inner)
                if (key, inner) in _BY_KEY and isinstance(before, dict) and isinstance(new, dict):
                    section[inner] = before | new
                else:
                    section[inner] = new
                    merged.where = {place: at for place, at in merged.where.items() if place[:2] != (key, inner)}
        merged.where |= {place: at for place, at in part.where.items() if place or not merged.where}
        merged.spelt |= part.spelt
        merged.switches += part.switches
        merged.notes += part.notes
        merged.problems += part.problems
    return merged


def _method_problems(valid: ValidPart, found: NormalisedConfig) -> list[Diagnostic]:
    """Errors of `lorary.method`, at the keys that caused them."""
    if valid.config is None or valid.invalid & {("method",), ("method", "name"), ("method", "options")}:
        return []
    section = valid.config.method
    parts: dict[Place, MethodSection | AlsoSection] = {("method",): section}
    parts |= {("method", "also", i): part for i, part in enumerate(section.also)}
    problems = []
    for place, part in parts.items():
        try:
            part.build()
        except MethodError as error:
            problems += [_located(problem, part, place, found) for problem in error.problems]
    return problems


def _arm_problems(valid: ValidPart, found: NormalisedConfig) -> list[Diagnostic]:
    """Errors of the methods of a comparison, each with the name of its method."""
    if valid.config is None:
        return []
    problems = []
    for i, arm in enumerate(valid.config.compare.methods):
        try:
            read_method(arm.method, valid.config.data.max_length)
        except ConfigError as error:
            where = found.find(("compare", "methods", i))
            problems += [Diagnostic(where, f"{arm.name}: {problem.what}", problem.fix) for problem in error.problems]
    return problems


def _located(
    problem: Diagnostic, section: MethodSection | AlsoSection, at: Place, found: NormalisedConfig
) -> Diagnostic:
    key, fix = problem.where.strip("'\""), problem.fix
    place: Place = (*at, "name")
    if key in section.name:
        place = (*at, "name", section.name.index(key))
    elif key in section.options:
        place = (*at, "options", key)
    elif key in ("r", "alpha", "dropout"):
        place = (*at, key)
    if "is not an option" in problem.what:
        owners = [preset.name for preset in presets().values() if key in preset.parameters]
        fix = f"it is an option of {', '.join(owners)}" if owners else fix
        if near := [name for name in nearest(key, SECTIONS["method"], cutoff=0.8) if name != key]:
            fix = f"did you mean `{near[0]}`?" + (f" (`{key}` is an option of {', '.join(owners)})" if owners else "")
    joint = " " if problem.what.startswith("is ") else ": "
    return Diagnostic(found.find(place), f"`{key}`{joint}{problem.what}" if key else problem.what, fix)
