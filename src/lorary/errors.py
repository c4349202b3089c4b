"""Errors that a user can cause: a headline, and all reasons at once, each with where, what and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Diagnostic:
    """One reason why something cannot work.

    Args:
        where: the site, key, file or line that the reason is about; empty where the headline says it.
        what: what is wrong, with both values where two disagree.
        fix: what the user can do about it; empty where `what` already says so.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n      hint: {self.fix}" if self.fix else text


def deduplicated(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Each reason once, with the first place that it holds at and how many more there are.

    >>> print(once([Problem("q", "is too small"), Problem("k", "is too small"), Problem("v", "is missing")])[0])
    q and 1 more: is too small
    """
    places: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        places.setdefault((problem.what, problem.fix), []).append(problem.where)
    return [
        Diagnostic(f"{first} and {len(more)} more" if more else first, what, fix)
        for (what, fix), (first, *more) in places.items()
    ]


class LoraryError(Exception):
    """The base of every error that a user can cause.

    Args:
        headline: one line that says what could not be done.
        problems: every reason, gathered before anything was raised.
    """

    exit_code = 1

    def __init__(self, headline: str, problems: Iterable[Diagnostic] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__("\n".join([headline, *(f"  - {problem}" for problem in self.problems)]))


class MethodError(LoraryError, ValueError):
    """A method whose parts are invalid or contradict each other."""

    exit_code = 2


class PlanError(LoraryError, ValueError):
    """A method that does not fit this model, or targets that name nothing in it."""

    exit_code = 2


class ConfigError(LoraryError, ValueError):
    """A configuration file or a command line that cannot be understood."""

    exit_code = 2


class DataError(LoraryError, ValueError):
    """Training data that is malformed, or that would teach nothing."""

    exit_code = 3


class FileError(LoraryError, ValueError):
    """An adapter or checkpoint on disk that is missing, damaged, hostile, or made for another model."""

    exit_code = 4


class StateError(LoraryError, RuntimeError):
    """A call that the model's present state does not allow (merge without an adapter, attach over one)."""


class TrainingError(LoraryError, RuntimeError):
    """Training that had to stop: a loss or gradient that is not finite, a lost checkpoint."""


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The `most` words of `known` that a mistyped `word` most likely meant, best first.

    >>> nearest("q_porj", ["q_proj", "k_proj", "norm"])
    ['q_proj', 'k_proj']
    """
    lowered = {k.lower(): k for k in known}
    return [lowered[m] for m in difflib.get_close_matches(word.lower(), lowered, n=most, cutoff=0.6)]


def suggestion(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known words; empty where none is near.

    >>> suggestion("q_porj", ["q_proj", "k_proj", "norm"])
    'did you mean `q_proj` or `k_proj`?'
    """
    near = nearest(word, known)
    return "did you mean " + " or ".join(f"`{n}`" for n in near) + "?" if near else ""


def suggested_path(path: Path, *, folders: bool = False) -> str:
    """A hint that names what lies beside a path that is not there and is called nearly so; only folders if asked."""
    beside = [p.name for p in path.parent.iterdir() if p.is_dir() or not folders] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    return "did you mean " + " or ".join(f"`{path.parent / n}`" for n in near) + "?" if near else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known words, or lists them all where none is near."""
    known = list(known)
    return suggestion(word, known) or "known: " + ", ".join(sorted(known))
