"""AsIs: every layer keeps the weight that it came with."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.words import Storage, word


@word
@dataclass(frozen=True)
class AsIs(Storage):
    """Every layer keeps the weight that it came with."""
