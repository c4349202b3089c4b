"""The sources of the built-in data: files of the running Python installation.

None of them is copied into this package. Some Pythons lack files (headers are a separate package on some systems,
embedded builds have no source), so every reader raises an error instead of returning nothing.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TextIO

from lorary.errors import DataError, Diagnostic

# Tests, generated tables, build settings, pip's wheels, and the topics, which are another corpus.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "lib-dynload", "pydoc_data",
        "site-packages", "test", "tests",
    }
)  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_HELD_OUT_IN = 9  # one file in nine


@cache
def stdlib() -> tuple[tuple[str, str], ...]:
    """The (relative path, text) of every non-test source file of the standard library, sorted by path.

    Raises:
        DataError: this Python has no library source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = _read(root, ".py", tokenize.open)
    if not found:
        raise DataError(
            "cannot read builtin:python:",
            [Diagnostic(str(root), "no .py files: this Python has no library source", "use builtin:topics")],
        )
    return found


@cache
def headers() -> tuple[tuple[str, str], ...]:
    """The (relative path, text) of each of CPython's C headers, sorted by path.

    `pyconfig.h` is left out: the build writes it, so it differs from machine to machine.

    Raises:
        DataError: the headers are not installed.
    """
    root = Path(sysconfig.get_path("include"))
    found = tuple(h for h in _read(root, ".h", lambda p: p.open(encoding="utf-8")) if h[0] != "pyconfig.h")
    if not found:
        fix = (
            "install Python's development headers (python3-dev, python3-devel), "
            "or use builtin:topics, which every Python has; load(..., fallback=True) does so by itself"
        )
        raise DataError(
            "cannot read builtin:c-headers:",
            [Diagnostic(str(root), "no C headers: they are not installed with this Python", fix)],
        )
    return found


@cache
def topics() -> tuple[tuple[str, str], ...]:
    """The (name, text) of every help topic of the language reference that `pydoc` ships, sorted by name.

    Raises:
        DataError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics as shipped
    except ImportError as error:
        raise DataError(
            "cannot read builtin:topics:",
            [Diagnostic("pydoc_data.topics", "not installed with this Python", "use builtin:python")],
        ) from error
    return tuple(sorted((name, text.strip() + "\n") for name, text in shipped.items()))


def held_out(path: str) -> bool:
    """Whether the file `path` (relative, with `/`) is for validation: one in nine, by a hash of its name.

    The split is the same on every installation, in every corpus and in every process (unlike Python's `hash`).
    """
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % _HELD_OUT_IN == 0


def _read(root: Path, ending: str, opened: Callable[[Path], TextIO]) -> tuple[tuple[str, str], ...]:
    texts = []
    for file in _files(root, ending):
        try:
            with opened(file) as stream:
                text = stream.read()
        except (OSError, SyntaxError, UnicodeDecodeError):  # an unreadable file or a wrong coding line
            continue
        if text.strip():
            texts.append((file.relative_to(root).as_posix(), text))
    return tuple(sorted(texts))


def _files(root: Path, ending: str) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        below[:] = [b for b in below if b not in _SKIPPED_FOLDERS and not b.startswith(_SKIPPED_PREFIXES)]
        for file in files:
            if file.endswith(ending) and not file.startswith(_SKIPPED_PREFIXES):
                yield Path(folder, file)
