"""The warnings of an export, as notes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def notes() -> Iterator[None]:
    """Print the warnings about an adapter and its export as notes on standard error."""
    from lorary.files.findings import AdapterWarning
    from lorary.layers.rope import PositionsWarning

    with warnings.catch_warnings(record=True) as caught:
        for category in (AdapterWarning, PositionsWarning):
            warnings.simplefilter("always", category)
        yield
    for warning in caught:
        if issubclass(warning.category, (AdapterWarning, PositionsWarning)):
            print(f"note: {warning.message}", file=sys.stderr)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
