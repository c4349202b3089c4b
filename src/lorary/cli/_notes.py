"""Notes on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def print_notes(notes: Iterable[object]) -> None:
    """Print each note on standard error."""
    from lorary.cli import printable

    for note in notes:
        print(f"note: {printable(str(note))}", file=sys.stderr)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print the warnings about an adapter and its export as notes."""
    from lorary.files.findings import AdapterWarning
    from lorary.layers.rope import PositionsWarning

    with warnings.catch_warnings(record=True) as caught:
        for category in (AdapterWarning, PositionsWarning):
            warnings.simplefilter("always", category)
        yield
    for warning in caught:
        if issubclass(warning.category, (AdapterWarning, PositionsWarning)):
            print_notes([warning.message])
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
