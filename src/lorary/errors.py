"""Errors that a user can cause: a headline and all problems at once, each with place, cause and fix."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")
_NUMBER = re.compile(r"\d+")
_PATH = re.compile(r"\w+(\.\w+)+|\d+")
_ALIKE = 6


@dataclass(frozen=True)
class Diagnostic:
    """One problem of an error.

    Args:
        where: the site, key, file or line; empty if the headline names it.
        what: the cause, with both values if two disagree.
        fix: what the user can do; empty if `what` says so.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n      hint: {self.fix}" if self.fix else text


def deduplicated(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The distinct problems, each with its first place and the number of others.

    >>> print(deduplicated([Diagnostic("q", "is too small"), Diagnostic("k", "is too small")])[0])
    q and 1 more: is too small
    """
    places: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        places.setdefault((problem.what, problem.fix), []).append(problem.where)
    return [
        Diagnostic(f"{first} and {len(more)} more" if more else first, what, fix)
        for (what, fix), (first, *more) in places.items()
    ]


def folded(problems: Iterable[Diagnostic]) -> list[str]:
    """The problems as text; of more than eight that differ only in paths and numbers, six and the number of others.

    >>> folded([Diagnostic(f"layers.{i}.q_proj", "is quantised") for i in range(50)])[5:]
    ['layers.5.q_proj: is quantised', '... and 44 more like it']
    """
    problems = list(problems)
    kinds = [(_PATH.sub("path", p.where), *(_NUMBER.sub("#", text) for text in (p.what, p.fix))) for p in problems]
    counts, seen, lines = Counter(kinds), Counter[tuple[str, ...]](), []
    for problem, kind in zip(problems, kinds, strict=True):
        seen[kind] += 1
        if counts[kind] <= _ALIKE + 2 or seen[kind] <= _ALIKE:
            lines.append(str(problem))
        elif seen[kind] == _ALIKE + 1:
            lines.append(f"... and {counts[kind] - _ALIKE} more like it")
    return lines


def not_a(kind: Any, what: str, **arguments: object) -> list[Diagnostic]:
    """The errors of arguments that are not of a type, as in `not_a(nn.Module, "a torch.nn.Module", model=model)`."""
    wrong = {name: value for name, value in arguments.items() if not isinstance(value, kind)}
    return [Diagnostic(name, f"is a {type(value).__name__}, not {what}") for name, value in wrong.items()]


def caller_stacklevel() -> int:
    """The `stacklevel` with which a warning points to the first line outside of this package, at any depth."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lorary", "contextlib"):
        level, frame = level + 1, frame.f_back
    return level


class LoraryError(Exception):
    """The base of every error that a user can cause.

    Args:
        headline: one line: what failed.
        problems: all problems, collected before raising; the message shows some of many alike (`folded`).
    """

    exit_code = 1

    def __init__(self, headline: str, problems: Iterable[Diagnostic] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__("\n".join([headline, *(f"  - {line}" for line in folded(self.problems))]))

    def problems_of(self, name: str) -> list[Diagnostic]:
        """The problems, or else the headline as one, each placed under a name: for an error about several things.

        >>> print(*LoraryError("", [Diagnostic("rank", "is 0")]).problems_of("french"))
        french: rank: is 0
        """
        found = self.problems or [Diagnostic("", self.headline)]
        return [replace(problem, where=f"{name}: {problem.where}" if problem.where else name) for problem in found]

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: with its problems and further attributes, which `Exception` alone would lose."""
        return _unpickled, (type(self), self.args, vars(self))


def _unpickled(kind: type[LoraryError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> LoraryError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(attributes)
    return error


class MethodError(LoraryError, ValueError):
    """A method with invalid or contradictory components."""

    exit_code = 2


class PlanError(LoraryError, ValueError):
    """A method that does not fit the model, or targets that match nothing."""

    exit_code = 2


class ConfigError(LoraryError, ValueError):
    """An invalid configuration file or command line."""

    exit_code = 2


class DataError(LoraryError, ValueError):
    """Training data that is malformed or without any label."""

    exit_code = 3


class FileError(LoraryError, ValueError):
    """An adapter or checkpoint on disk that is missing, damaged, hostile, or made for another model."""

    exit_code = 4


class StateError(LoraryError, RuntimeError):
    """A call that the model's state does not allow (merge without an adapter, attach over one)."""


class TrainingError(LoraryError, RuntimeError):
    """Training that had to stop: a loss or gradient that is not finite, a lost checkpoint."""


def changed_release(package: str, *what: str) -> LoraryError:
    """The error for private names of another library that its installed release does not have, or has changed.

    Args:
        package: as it is installed, such as `transformers`.
        what: each name and what is wrong with it.
    """
    from importlib import metadata

    try:
        release = f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        release = package
    fix = f"pip install --upgrade lorary, or install an older {package}; please report it with `lorary doctor --json`"
    problems = [Diagnostic(release, one, fix if one is what[-1] else "") for one in what]
    return LoraryError(f"this release of {package} does not work with lorary:", problems)


def check_overridden(cls: type, expected: Mapping[str, tuple[str, ...]], package: str) -> None:
    """Refuse a release of another library whose private methods differ from those that lorary overrides.

    Args:
        cls: the library's class.
        expected: method -> the names of its first arguments; more are fine if they have defaults.
        package: the library.

    Raises:
        LoraryError: every method that is missing or takes other arguments.
    """
    problems = []
    for name, arguments in expected.items():
        method = getattr(cls, name, None)
        if method is None:
            problems.append(f"{cls.__name__} has no {name}")
            continue
        _, *found = inspect.signature(method).parameters.values()
        more = [parameter for parameter in found[len(arguments) :] if parameter.default is parameter.empty]
        named = tuple(parameter.name for parameter in found)
        if named[: len(arguments)] != arguments or any(p.kind is p.POSITIONAL_OR_KEYWORD for p in more):
            problems.append(f"{cls.__name__}.{name} takes ({', '.join(named)}), not ({', '.join(arguments)})")
    if problems:
        raise changed_release(package, *problems)


def nearest(word: str, known: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """The `most` names in `known` nearest to a mistyped `word`, best first; a higher `cutoff` (to 1) is stricter.

    >>> nearest("q_porj", ["q_proj", "k_proj", "norm"])
    ['q_proj', 'k_proj']
    """
    lowered = {k.lower(): k for k in known}
    return [lowered[m] for m in difflib.get_close_matches(word.lower(), lowered, n=most, cutoff=cutoff)]


def suggestion(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest known names; empty if none is near.

    >>> suggestion("q_porj", ["q_proj", "k_proj", "norm"])
    'did you mean `q_proj` or `k_proj`?'
    """
    return _did_you_mean(nearest(word, known))


def suggested_path(path: Path, *, folders: bool = False) -> str:
    """A hint with the existing files nearest to a missing path; with `folders`, folders only."""
    beside = [p.name for p in path.parent.iterdir() if p.is_dir() or not folders] if path.parent.is_dir() else []
    return _did_you_mean(path.parent / name for name in nearest(path.name, beside))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest known names, or all of them if none is near."""
    known = list(known)
    return suggestion(word, known) or "known: " + ", ".join(sorted(known))


def _did_you_mean(near: Iterable[object]) -> str:
    names = " or ".join(f"`{name}`" for name in near)
    return f"did you mean {names}?" if names else ""


def independent(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """The results of two steps that do not need each other.

    Raises:
        LoraryError: of the step that fails; if both do, the first one's, with the problems of both.
    """
    try:
        result = first()
    except LoraryError as error:
        try:
            second()
        except LoraryError as other:
            headline = other.headline.rstrip(":")
            rest = [Diagnostic(p.where or headline, p.what, p.fix) for p in other.problems] or [
                Diagnostic("", headline)
            ]
            raise type(error)(error.headline, [*error.problems, *rest]) from error
        raise
    return result, second()
