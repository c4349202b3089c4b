"""The file of a comparison: strict JSON with a version, written atomically.

Losses that are not finite, those of a run that diverged, are written as the texts "nan", "inf" and "-inf", as JSON has
no numbers for them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lorary.analysis.comparison.record import Comparison, Merge, Scores
from lorary.errors import Diagnostic, FileError, suggestion
from lorary.files.atomic import atomic_file
from lorary.files.safe_open import read_json
from lorary.files.strict_json import named, show

FORMAT, VERSION = "lorary-comparison", 1
MOST_BYTES = 256 << 20
# settings that a comparison goes on from, or that its page shows in words; the others are read by nobody
_SETTINGS = {
    **{"seconds": float, "reference": str, "notes": tuple[str, ...], "digests": Mapping[str, str]},
    **{"request": Mapping[str, Any], "timings": Mapping[str, Mapping[str, Any]]},
}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def write(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write a comparison as JSON, as a whole or not at all.

    Args:
        comparison: the record.
        path: the file to create or replace; its folder must exist.

    Raises:
        FileError: the record holds a value that a reader would refuse, or the file cannot be written.
    """
    headline = f"cannot write the comparison {show(os.fspath(path), most=400)}:"
    document = {"format": FORMAT, "version": VERSION} | _plain(comparison)
    if problems := [*_problems(document)]:
        raise FileError(headline, problems)
    try:
        data = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise FileError(headline, [Diagnostic("", f"JSON cannot hold it: {error}")]) from None
    with atomic_file(path) as file:
        file.write(data + b"\n")


def read(path: str | os.PathLike[str]) -> Comparison:
    """The comparison in a file.

    Raises:
        FileError: the file is missing, damaged, or not a comparison; with every reason.
    """
    headline = f"cannot read the comparison {show(os.fspath(path), most=400)}:"
    try:
        folder = Path(path).parent.resolve(strict=True)
        document = read_json(folder, Path(path).name, MOST_BYTES)
    except FileError as error:
        raise FileError(headline, error.problems) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(headline, [Diagnostic("", f"the path cannot be followed: {error}")]) from None
    if isinstance(document, dict) and isinstance(costs := document.get("costs"), dict):
        document = {**document, "costs": {name: _with_merge_note(cost) for name, cost in costs.items()}}
    if problems := [*_problems(document)]:
        raise FileError(headline, problems)
    assert isinstance(document, dict)
    found = _made(Comparison, {key: value for key, value in document.items() if key not in ("format", "version")})
    assert isinstance(found, Comparison)
    return found


def _with_merge_note(cost: object) -> object:
    """A cost; in the first records `merge` held the reason or the error too."""
    if not isinstance(cost, dict) or "merge_note" in cost or not isinstance(text := cost.get("merge"), str):
        return cost
    if text in get_args(Merge):
        return cost
    kind, _, note = text.partition(": ")
    kind, note = (kind, note) if kind in get_args(Merge) else ("no", text)
    return {**cost, "merge": kind, "merge_note": note}


def _problems(document: object) -> Iterator[Diagnostic]:
    """What is wrong with a document: its head, else its fields, else what they say of each other."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        yield Diagnostic("", f'is not a comparison: it has no "format": "{FORMAT}"', "name the file that compare wrote")
    elif document.get("version") != VERSION:
        fix = "update lorary, or compare again"
        yield Diagnostic("version", f"is {show(document.get('version'))}; this version reads {VERSION}", fix)
    else:
        content = {key: value for key, value in document.items() if key not in ("format", "version")}
        wrong = [*_wrong(Comparison, content, ""), *_wrong_settings(content.get("settings"))]
        yield from wrong or _contradictions(_made(Comparison, content))


def _wrong(kind: Any, value: Any, where: str) -> Iterator[Diagnostic]:
    """Where a value of a document is not what a type says."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if is_dataclass(kind):
        yield from _wrong_fields(kind, value, where)
    elif origin is Literal:
        if value not in arguments or not isinstance(value, str):
            yield Diagnostic(where, f"is {show(value)}, not {' or '.join(map(show, arguments))}")
    elif type(None) in arguments:
        if value is not None:
            yield from _wrong(arguments[0], value, where)
    elif origin is tuple:
        yield from _wrong_items(arguments, value, where)
    elif origin is Mapping:
        if not isinstance(value, dict):
            yield Diagnostic(where, f"is {_kind(value)}, not an object")
        else:
            for key, item in value.items():
                yield from _wrong(arguments[1], item, f"{where}.{named(key)}")
    elif kind is float:
        if not _is_number(value) and not (isinstance(value, str) and value in _NOT_FINITE):
            yield Diagnostic(where, f"is {_kind(value)}, not a number")
    elif kind is int:
        if not isinstance(value, int) or isinstance(value, bool):
            yield Diagnostic(where, f"is {_kind(value)}, not a whole number")
    elif not isinstance(value, str):
        yield Diagnostic(where, f"is {_kind(value)}, not a text")


def _wrong_settings(settings: Any) -> Iterator[Diagnostic]:
    known = settings if isinstance(settings, dict) else {}
    for key, kind in _SETTINGS.items():
        if key in known:
            yield from _wrong(kind, known[key], f"settings.{key}")


def _wrong_fields(kind: Any, value: Any, where: str) -> Iterator[Diagnostic]:
    if not isinstance(value, dict):
        yield Diagnostic(where, f"is {_kind(value)}, not an object")
        return
    types, prefix = get_type_hints(kind), f"{where}." if where else ""
    for field in fields(kind):
        if field.name in value:
            yield from _wrong(types[field.name], value[field.name], f"{prefix}{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            yield Diagnostic(f"{prefix}{field.name}", "is missing")
    for key in value:
        if key not in types:
            yield Diagnostic(f"{prefix}{named(key)}", "is unknown", suggestion(key, [*types]))


def _wrong_items(arguments: tuple[Any, ...], value: Any, where: str) -> Iterator[Diagnostic]:
    kinds = None if arguments[-1] is Ellipsis else arguments
    if isinstance(value, list) and kinds is None and {type(item) for item in value} <= {arguments[0]} & {int, float}:
        return  # the many scores of the rows, quickly
    if not isinstance(value, list):
        yield Diagnostic(where, f"is {_kind(value)}, not a list")
    elif kinds is not None and len(value) != len(kinds):
        yield Diagnostic(where, f"is a list of {len(value)}, not of {len(kinds)}")
    else:
        for i, item in enumerate(value):
            yield from _wrong(kinds[i] if kinds else arguments[0], item, f"{where}[{i}]")


def _made(kind: Any, value: Any) -> Any:
    """The value of a type, from a document without problems."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        types = get_type_hints(kind)
        return kind(**{key: _made(types[key], item) for key, item in value.items()})
    if origin is tuple:
        many = arguments[-1] is Ellipsis
        return tuple(_made(arguments[0] if many else arguments[i], item) for i, item in enumerate(value))
    if origin is Mapping:
        return {key: _made(arguments[1], item) for key, item in value.items()}
    if kind is float:
        return _NOT_FINITE[value] if isinstance(value, str) else float(value)
    return _made(arguments[0], value) if type(None) in arguments and value is not None else value


def _contradictions(comparison: Comparison) -> Iterator[Diagnostic]:
    """Statements of a comparison that exclude each other, or numbers that no run can have."""
    names = [arm.name for arm in comparison.arms]
    for i, arm in enumerate(comparison.arms):
        if not arm.name or not arm.name.isprintable():
            yield Diagnostic(f"arms[{i}].name", f"is {show(arm.name)}: a name has characters, all of them printable")
        elif arm.name in names[:i]:
            yield Diagnostic(f"arms[{i}].name", f"{show(arm.name)} is the name of an earlier one")
        if not all(0 < rate < math.inf for rate in arm.rates):
            yield Diagnostic(f"arms[{i}].rates", "a learning rate is not a positive number")
    if not _is_number(seconds := comparison.settings.get("seconds", 0)) or not 0 <= seconds < math.inf:
        yield Diagnostic("settings.seconds", f"is {show(seconds)}, not a time")
    first: dict[tuple[str, float, int], int] = {}
    for i, trial in enumerate(comparison.trials):
        if (j := first.setdefault((trial.arm, trial.lr, trial.seed), i)) != i:
            yield Diagnostic(f"trials[{i}]", f"is the run of trials[{j}], which would count twice")
        if (folder := PurePath(trial.folder)).is_absolute() or ".." in folder.parts:
            yield Diagnostic(f"trials[{i}].folder", f"is {show(trial.folder)}, outside of the comparison's")
        if trial.arm not in names:
            yield Diagnostic(f"trials[{i}].arm", f"no method is named {show(trial.arm)}", suggestion(trial.arm, names))
        if not 0 < trial.lr < math.inf:
            yield Diagnostic(f"trials[{i}].lr", f"is {trial.lr}, not a positive number")
        for field in ("test", "general"):
            yield from _wrong_scores(getattr(trial, field), f"trials[{i}].{field}")
    yield from _wrong_scores(comparison.base_test, "base_test")
    yield from _wrong_scores(comparison.base_general, "base_general")
    for name, cost in comparison.costs.items():
        if name not in names:
            yield Diagnostic(f"costs.{named(name)}", "no method has this name", suggestion(name, names))
        counts = (cost.trained, cost.file_bytes, cost.peak_bytes, cost.context)
        times = (*cost.step_seconds, *cost.forward, *cost.merged_forward)
        if min(counts) < 0 or not all(0 <= seconds < math.inf for seconds in times):
            yield Diagnostic(f"costs.{named(name)}", "a count or a time is negative or not finite")


def _wrong_scores(scores: Scores | None, where: str) -> Iterator[Diagnostic]:
    if scores is None:
        return
    lengths = {len(scores.nats), len(scores.tokens), len(scores.right)}
    if len(lengths) > 1 or lengths == {0}:
        counts = f"{len(scores.nats)} nats, {len(scores.tokens)} tokens and {len(scores.right)} right"
        yield Diagnostic(where, f"has {counts}: not one of each for every row")
    elif min(scores.tokens) < 1:
        yield Diagnostic(f"{where}.tokens", f"a row has {min(scores.tokens)} tokens")
    elif not all(0 <= right <= tokens for right, tokens in zip(scores.right, scores.tokens, strict=True)):
        yield Diagnostic(f"{where}.right", "a row has more right tokens than tokens, or fewer than none")
    elif min(scores.nats) < 0:
        yield Diagnostic(f"{where}.nats", f"a row has a cross entropy of {min(scores.nats):g}")


def _plain(value: Any) -> Any:
    """A value of a record as JSON holds it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return _KINDS.get(type(value)) or f"the number {show(value)}"
