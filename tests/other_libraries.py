"""Defects of other libraries: no test asserts them.

A test may show why lorary does something in its own way. It compares the other library with the truth, after its own
assertions, and is skipped where that library is right: its defects depend on the release and on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest


def skip_if_right(library: str, right: bool) -> None:
    """Skips the rest of a test where `library` gives the right answer."""
    if right:
        pytest.skip(f"{library} {version(library)} is right here")


@contextmanager
def skip_if_it_works(library: str) -> Iterator[None]:
    """Skips the rest of a test where `library` does what is asked without an error."""
    try:
        yield
    except Exception:
        return
    skip_if_right(library, True)
