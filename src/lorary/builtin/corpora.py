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
from functools import cache
from typing import Any

from lorary.builtin import sources, syntax
from lorary.errors import DataError, Diagnostic, did_you_mean

Record = dict[str, Any]
Origins = tuple[tuple[str, Record], ...]  # (source file, record)


def names() -> tuple[str, ...]:
    """The names of the built-in data sets.

    >>> "builtin:topics" in names()
    True
    """
    return tuple(_CORPORA)


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
    if name not in _CORPORA:
        problem = Diagnostic("", "unknown name", did_you_mean(name, names()))
        raise DataError(f"no built-in data set is called {name!r}", [problem])
    if split not in ("train", "validation"):
        problem = Diagnostic("split", f"got {split!r}", "use train or validation")
        raise DataError(f"{name} has no split {split!r}", [problem])
    try:
        records = _CORPORA[name]()
    except DataError:
        if not (fallback and name == "builtin:c-headers"):
            raise
        records = _CORPORA["builtin:topics"]()
    wanted = split == "validation"
    return tuple((path, record) for path, record in records if sources.held_out(path) is wanted)


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
        (path, {"messages": [_message("user", pair.signature), _message("assistant", pair.summary)]})
        for path, pair in syntax.summaries(sources.stdlib())
    )


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@cache
def _modules() -> Origins:
    return tuple((path, {"text": text, "label": label}) for path, text, label in syntax.labelled(sources.stdlib()))


_CORPORA: dict[str, Callable[[], Origins]] = {
    "builtin:python": _texts(sources.stdlib),
    "builtin:c-headers": _texts(sources.headers),
    "builtin:topics": _texts(sources.topics),
    "builtin:docstrings": _docstrings,
    "builtin:docstrings-chat": _docstrings_chat,
    "builtin:modules": _modules,
}
