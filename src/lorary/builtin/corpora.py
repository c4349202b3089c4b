"""The built-in data sets: plain lists of records, made at run time from the Python installation itself.

| name | one record | from |
|---|---|---|
| `builtin:python` | `{"text"}` | a source file of the standard library; what the built-in base learnt from |
| `builtin:c-headers` | `{"text"}` | one of CPython's C headers: a strong shift of domain |
| `builtin:topics` | `{"text"}` | a page of the language reference: English prose |
| `builtin:docstrings` | `{"prompt", "completion"}` | a function's signature, the first line of its docstring |
| `builtin:docstrings-chat` | `{"messages"}` | the same as a conversation |
| `builtin:modules` | `{"text", "label"}` | a function or class, the kind of module that it is from |

One file in nine is held out, the same files in every set, so the built-in base has not seen the validation half of
any of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lorary.builtin import sources, syntax
from lorary.errors import DataError, Diagnostic, did_you_mean

Record = dict[str, Any]
Origins = tuple[tuple[str, Record], ...]  # (the file that a record is from, the record)


@dataclass(frozen=True)
class Corpus:
    """One built-in data set: a line that says what it is, and how its records are made."""

    summary: str
    read: Callable[[], Origins]


def names() -> tuple[str, ...]:
    """The names of the built-in data sets, as `load` takes them.

    >>> "builtin:topics" in names()
    True
    """
    return tuple(_CORPORA)


def describe(name: str) -> str:
    """One line about the data set `name`.

    Raises:
        DataError: there is no such data set.
    """
    return _corpus(name).summary


def load(name: str, split: str, *, fallback: bool = False) -> list[Record]:
    """The records of one half of the built-in data set `name`, in the order of their files.

    Args:
        name: one of `names()`.
        split: "train" or "validation".
        fallback: give `builtin:topics` where `builtin:c-headers` are not installed, instead of raising.

    Returns:
        A new list of new dicts: the caller may change them.

    Raises:
        DataError: there is no such set or split, or this Python lacks the files it is made from.

    >>> sorted(load("builtin:docstrings", "validation")[0])
    ['completion', 'prompt']
    """
    return [copy.deepcopy(record) for _, record in _half(name, split, fallback)]


def origins(name: str, split: str, *, fallback: bool = False) -> list[str]:
    """For each record that `load` gives for the same arguments, the file (or topic) that it is from."""
    return [path for path, _ in _half(name, split, fallback)]


def _half(name: str, split: str, fallback: bool) -> Origins:
    corpus = _corpus(name)
    if split not in ("train", "validation"):
        raise DataError(
            f"{name} has no split {split!r}", [Diagnostic("split", f"got {split!r}", "use train or validation")]
        )
    try:
        records = corpus.read()
    except DataError:
        if not (fallback and name == "builtin:c-headers"):
            raise
        records = _topics()
    wanted = split == "validation"
    return tuple((path, record) for path, record in records if sources.held_out(path) is wanted)


def _corpus(name: str) -> Corpus:
    if name not in _CORPORA:
        raise DataError(
            f"no built-in data set is called {name!r}", [Diagnostic("", "unknown name", did_you_mean(name, names()))]
        )
    return _CORPORA[name]


@cache
def _python() -> Origins:
    return tuple((path, {"text": text}) for path, text in sources.stdlib())


@cache
def _headers() -> Origins:
    return tuple((path, {"text": text}) for path, text in sources.headers())


@cache
def _topics() -> Origins:
    return tuple((name, {"text": text}) for name, text in sources.topics())


@cache
def _docstrings() -> Origins:
    return tuple(
        (path, {"prompt": f"{pair.signature}\n", "completion": pair.summary})
        for path, pair in syntax.summaries(sources.stdlib())
    )


@cache
def _docstrings_chat() -> Origins:
    return tuple(
        (path, {"messages": [_said("user", pair.signature), _said("assistant", pair.summary)]})
        for path, pair in syntax.summaries(sources.stdlib())
    )


@cache
def _modules() -> Origins:
    return tuple((path, {"text": text, "label": label}) for path, text, label in syntax.labelled(sources.stdlib()))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_CORPORA = {
    "builtin:python": Corpus("source files of Python's standard library, without its tests", _python),
    "builtin:c-headers": Corpus("CPython's C headers: a strong shift of domain from Python source", _headers),
    "builtin:topics": Corpus("the language reference's help topics: English prose", _topics),
    "builtin:docstrings": Corpus("a function's signature → the first line of its docstring", _docstrings),
    "builtin:docstrings-chat": Corpus("the same pairs as conversations of user and assistant", _docstrings_chat),
    "builtin:modules": Corpus("a function or class → the kind of module it is from (classification)", _modules),
}
