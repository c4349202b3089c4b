"""The built-in data sets: lists of records, made at run time from the Python installation.

| name | one record | from |
|---|---|---|
| `builtin:python` | `{"text"}` | a source file of the standard library; the training data of the built-in base |
| `builtin:c-headers` | `{"text"}` | one of CPython's C headers: a strong shift of domain |
| `builtin:topics` | `{"text"}` | a page of the language reference: English prose |
| `builtin:docstrings` | `{"prompt", "completion"}` | a function's signature, the first line of its docstring |
| `builtin:docstrings-chat` | `{"messages"}` | the same as a conversation |
| `builtin:modules` | `{"text", "label"}` | a function or class, the kind of its module |

One file in nine is held out, the same files in every set, so the built-in base has seen no validation data.
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
Origins = tuple[tuple[str, Record], ...]  # (source file, record)


@dataclass(frozen=True)
class Corpus:
    """One built-in data set: a one-line summary, and the function that makes its records."""

    summary: str
    read: Callable[[], Origins]


def names() -> tuple[str, ...]:
    """The names of the built-in data sets.

    >>> "builtin:topics" in names()
    True
    """
    return tuple(_CORPORA)


def describe(name: str) -> str:
    """The one-line summary of the data set `name`.

    Raises:
        DataError: the data set does not exist.
    """
    return _corpus(name).summary


def load(name: str, split: str, *, fallback: bool = False) -> list[Record]:
    """The records of one half of the built-in data set `name`, in the order of their files.

    Args:
        name: one of `names()`.
        split: "train" or "validation".
        fallback: use `builtin:topics` if `builtin:c-headers` are not installed, instead of raising.

    Returns:
        A deep copy: the caller may change it.

    Raises:
        DataError: the set or split does not exist, or this Python lacks its source files.

    >>> sorted(load("builtin:docstrings", "validation")[0])
    ['completion', 'prompt']
    """
    return [copy.deepcopy(record) for _, record in _half(name, split, fallback)]


def origins(name: str, split: str, *, fallback: bool = False) -> list[str]:
    """The source file (or topic) of each record of `load` with the same arguments."""
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
        records = _CORPORA["builtin:topics"].read()
    wanted = split == "validation"
    return tuple((path, record) for path, record in records if sources.held_out(path) is wanted)


def _corpus(name: str) -> Corpus:
    if name not in _CORPORA:
        raise DataError(
            f"no built-in data set is called {name!r}", [Diagnostic("", "unknown name", did_you_mean(name, names()))]
        )
    return _CORPORA[name]


def _texts(files: Callable[[], tuple[tuple[str, str], ...]]) -> Callable[[], Origins]:
    """The records {"text"} of whole files."""
    return cache(lambda: tuple((path, {"text": text}) for path, text in files()))


@cache
def _docstrings() -> Origins:
    return tuple(
        (path, {"prompt": f"{pair.signature}\n", "completion": pair.summary})
        for path, pair in syntax.summaries(sources.stdlib())
    )


@cache
def _docstrings_chat() -> Origins:
    return tuple(
        (path, {"messages": _exchange(pair.signature, pair.summary)})
        for path, pair in syntax.summaries(sources.stdlib())
    )


@cache
def _modules() -> Origins:
    return tuple((path, {"text": text, "label": label}) for path, text, label in syntax.labelled(sources.stdlib()))


def _exchange(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


_CORPORA = {
    "builtin:python": Corpus("source files of Python's standard library, without its tests", _texts(sources.stdlib)),
    "builtin:c-headers": Corpus(
        "CPython's C headers: a strong shift of domain from Python source", _texts(sources.headers)
    ),
    "builtin:topics": Corpus("the language reference's help topics: English prose", _texts(sources.topics)),
    "builtin:docstrings": Corpus("a function's signature → the first line of its docstring", _docstrings),
    "builtin:docstrings-chat": Corpus("the same pairs as conversations of user and assistant", _docstrings_chat),
    "builtin:modules": Corpus("a function or class → the kind of module it is from (classification)", _modules),
}
