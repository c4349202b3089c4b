"""Configurations from files, dictionaries and the command line, with every mistake explained at once.

Precedence, lowest first: defaults, the file, `--set key=value` in the order given. The environment is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.errors import ConfigError, Diagnostic, MethodError
from lorary.spec.presets import presets
from lorary.train.config.aliases import NormalisedConfig, apply_flags, canonical
from lorary.train.config.config import SECTIONS, Config, MethodSection
from lorary.train.config.conflicts import contradictions
from lorary.train.config.pydantic_errors import explain
from lorary.train.config.yaml_source import ParsedYaml, Place, parse, read, scalar

_BY_KEY = (("method", "options"), ("method", "drop"))  # what a later source changes key by key
_YAML = ("[", "{", "'", '"')  # a value that begins otherwise is meant as it stands: *.q_proj is no alias


def load(path: str | Path, sets: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, with the overrides `sets`, such as `training.lr=1e-4`.

    Args:
        path: the file.
        sets: `key=value` each; the key is dotted, the value as in YAML, but that a glob needs no quotes. Later ones win
            over earlier ones and over the file.

    Raises:
        ConfigError: every mistake in the file and the overrides, each with file:line:column or `--set key`.
    """
    source = read(path)
    return _config([source, *overrides(sets)], str(path))


def from_dict(tree: Mapping[str, Any], sets: Sequence[str] = ()) -> Config:
    """The configuration that `tree` holds, under the same names and rules as a file.

    >>> from_dict({"model": "builtin:base", "data": "builtin:docstrings", "method": {"r": 8}}).method.r
    8

    Raises:
        ConfigError: every mistake, each with its dotted key.
    """
    plain = _plain(tree)
    return _config([ParsedYaml(plain, _dotted(plain)), *overrides(sets)], "the configuration")


def overrides(sets: Sequence[str]) -> list[ParsedYaml]:
    """One source per `key=value`.

    Raises:
        ConfigError: every one that is not of this form, or whose value is no YAML.
    """
    sources, problems = [], []
    for text in sets:
        key, equals, value = text.partition("=")
        keys = [part.strip() for part in key.split(".", 2)]
        where = f"--set {key.strip()}"
        if not equals or not all(keys):
            fix = "write --set section.key=value, such as --set training.lr=1e-4"
            problems.append(Diagnostic(f"--set {text}", "is not key=value", fix))
            continue
        try:
            tree = parse(value, where).tree if value.lstrip()[:1] in _YAML else scalar(value.strip())
        except ConfigError as error:
            problems += [Diagnostic(where, problem.what, problem.fix) for problem in error.problems]
            continue
        marks: dict[Place, str] = {(): where}
        for i in range(len(keys), 0, -1):
            marks[tuple(keys[:i])] = where
            tree = {keys[i - 1]: tree}
        sources.append(ParsedYaml(tree, marks))
    if problems:
        raise ConfigError("cannot read the overrides:", problems)
    return sources


def _config(sources: Sequence[ParsedYaml], name: str) -> Config:
    options = frozenset(key for preset in presets().values() for key in preset.parameters) - set(SECTIONS["method"])
    read_ = _merged([canonical(source, options) for source in sources])
    apply_flags(read_)
    problems, config = list(read_.problems), None
    try:
        config = Config.model_validate(read_.tree)
    except ValidationError as error:
        if read_.tree or not problems:
            problems += explain(error, read_)
    problems += _method_problems(read_)
    if config is not None:
        problems += [
            Diagnostic(read_.find(tuple(key.split("."))) or name, f"`{key}`: {problem.what}", problem.fix)
            for key, problem in contradictions(config)
        ]
    if problems or config is None:
        raise ConfigError(f"invalid configuration {name}:", sorted(problems, key=_position))
    return config.noted(*read_.notes)


def _position(problem: Diagnostic) -> tuple[int, int, int]:
    """Line and column, so that problems come in the order of the file; those of overrides last."""
    at = re.search(r":(\d+):(\d+)$", problem.where)
    return (0, int(at[1]), int(at[2])) if at else (1, 0, 0)


def _merged(parts: Sequence[NormalisedConfig]) -> NormalisedConfig:
    """Later parts over earlier ones: sections, preset options and LoRA-drop by key, everything else as a whole."""
    whole = NormalisedConfig()
    for part in parts:
        for key, value in part.tree.items():
            if not isinstance(value, dict):
                whole.tree[key] = value
                continue
            section = whole.tree.setdefault(key, {})
            for inner, inner_value in value.items():
                if (key, inner) in _BY_KEY and isinstance(inner_value, dict):
                    before = section.get(inner)
                    section[inner] = (before if isinstance(before, dict) else {}) | inner_value
                else:
                    section[inner] = inner_value
                    _forget(whole, (key, inner))
        whole.where |= {place: at for place, at in part.where.items() if len(place) != 0 or not whole.where}
        whole.spelt |= part.spelt
        whole.flags += part.flags
        whole.notes += part.notes
        whole.problems += part.problems
    return whole


def _forget(whole: NormalisedConfig, place: Place) -> None:
    for old in [p for p in whole.where if p[: len(place)] == place]:
        del whole.where[old]


def _method_problems(read_: NormalisedConfig) -> list[Diagnostic]:
    """What `lorary.method` says against the method section, placed where its words were written."""
    try:
        section = MethodSection.model_validate(read_.tree.get("method", {}))
    except ValidationError:
        return []  # explained already
    try:
        section.build()
    except MethodError as error:
        return [_placed(problem, section, read_) for problem in error.problems]
    return []


def _placed(problem: Diagnostic, section: MethodSection, read_: NormalisedConfig) -> Diagnostic:
    said, fix = problem.where.strip("'\""), problem.fix
    place: Place = ("method", "name")
    if said in section.name:
        place = ("method", "name", section.name.index(said))
    elif said in section.options:
        place = ("method", "options", said)
    elif said in ("r", "alpha", "dropout"):
        place = ("method", said)
    if "is not an option" in problem.what:
        owners = [preset.name for preset in presets().values() if said in preset.parameters]
        fix = f"it is an option of {', '.join(owners)}" if owners else fix
    joint = " " if problem.what.startswith("is ") else ": "
    what = f"`{said}`{joint}{problem.what}" if said else problem.what
    return Diagnostic(read_.find(place), what, fix)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _dotted(tree: Any, place: Place = ()) -> dict[Place, str]:
    marks = {place: ".".join(map(str, place))}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in items:
        marks |= _dotted(inner, (*place, key))
    return marks
