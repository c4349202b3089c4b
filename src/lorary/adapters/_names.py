"""The names of held adapters: which texts are names, and which adapters `switch` was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorary.adapters._held import HeldAdapter, held_by
from lorary.errors import Diagnostic, FileError, StateError, did_you_mean
from lorary.spec.fields import is_finite

_MOST_LETTERS = 200


class UnknownNameError(StateError, KeyError):
    """A model holds no adapter under this name."""

    __str__ = Exception.__str__  # of a KeyError, quotes and escapes


def bad_name(name: object) -> list[Diagnostic]:
    """Why a text cannot be the name of an adapter: it may become that of a folder, or of a model on a server."""
    where, fix = repr(name)[:_MOST_LETTERS], 'use a short text, such as "french" or "me/french-v2"'
    if not isinstance(name, str):
        return [Diagnostic(where, f"is a {type(name).__name__}, not a name", fix)]
    if not name or len(name) > _MOST_LETTERS or not name.isprintable() or name != name.strip():
        what = f"is not a name: it is empty, longer than {_MOST_LETTERS}, or has spaces around it or control characters"
        return [Diagnostic(where, what, fix)]
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return [Diagnostic(where, "is not a name: as that of a folder, it would lead out of the one above it", fix)]
    return []


def unknown_name(name: str, held: Iterable[str]) -> Diagnostic:
    """The error of a name under which nothing is held."""
    held = list(held)
    hint = did_you_mean(name, held) if held else 'lorary.named_adapters(model)["name"] = adapter holds one'
    return Diagnostic(repr(name)[:_MOST_LETTERS], "the model holds no adapter under this name", hint)


def weights_of_names(adapters: Any) -> list[tuple[Any, Any]] | None:
    """(name, weight) pairs, if `switch` was given names; they are not checked yet."""
    if isinstance(adapters, str):
        return [(adapters, 1.0)]
    if isinstance(adapters, Mapping):
        return list(adapters.items())
    if isinstance(adapters, (list, tuple)) and adapters and all(isinstance(a, str) for a in adapters):
        return [(name, 1.0) for name in adapters]
    return None


def held_under(model: nn.Module, weights: Sequence[tuple[Any, Any]]) -> dict[HeldAdapter, float]:
    """The held adapters of these names, with their weights.

    Raises:
        FileError: a name or a weight is wrong; every reason.
    """
    held, problems = held_by(model), []
    found: dict[HeldAdapter, float] = {}
    for name, weight in weights:
        if not isinstance(name, str) or name not in held:
            missing = unknown_name(str(name), held)
            what, fix = f"{missing.what}, and a {type(name).__name__} is not an adapter", missing.fix
            problems.append(Diagnostic(repr(name)[:_MOST_LETTERS], what, f"{fix}; lorary.load_adapter(path) reads one"))
        elif held[name] in found:
            problems.append(Diagnostic(repr(name), "is named twice", "add its weights: {name: 2.0}"))
        else:
            found[held[name]] = weight
        if not is_finite(weight):
            problems.append(Diagnostic(repr(name)[:_MOST_LETTERS], f"its weight is {weight!r}, not a finite number"))
    if not weights:
        problems.append(Diagnostic("adapters", "no name is given", "None is the base alone"))
    if problems:
        raise FileError("cannot switch adapters:", problems)
    return {one: float(weight) for one, weight in found.items()}
