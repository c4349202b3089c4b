"""The provenance of an adapter that was made from others: how, from which, with which weights and settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lorary.files.strict_json import show

_MOST_PARENTS = 10_000
_MOST_TEXT = 1_000  # characters of a name
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Parent:
    """An adapter, or a checkpoint, that another adapter was made from.

    Args:
        name: of its folder, or its Hub id; empty if it has none.
        sha256: its content hash, as `content_hash` gives it; empty for a checkpoint.
        weight: its weight in a mix; None otherwise.
    """

    name: str = ""
    sha256: str = ""
    weight: float | None = None


@dataclass(frozen=True)
class Provenance:
    """How an adapter was made from others.

    Args:
        how: the operation: "sum", "ties", "lorahub", "compress", "extract", ...
        parents: what it was made from, in the order given.
        settings: the operation's settings and the error that it reported: names to JSON values.
    """

    how: str
    parents: tuple[Parent, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The provenance as plain data for JSON."""
        return {"how": self.how, "parents": [asdict(p) for p in self.parents], "settings": dict(self.settings)}

    @staticmethod
    def from_record(record: object) -> Provenance:
        """The provenance of a record.

        Raises:
            ValueError: the record is malformed; the first reason.
        """
        if not isinstance(record, dict) or set(record) != {"how", "parents", "settings"}:
            raise ValueError("must be an object with how, parents and settings")
        how, parents, settings = record["how"], record["parents"], record["settings"]
        if not _is_text(how) or not how:
            raise ValueError(f"how is {show(how)}, not the name of an operation")
        if not isinstance(parents, list) or len(parents) > _MOST_PARENTS:
            raise ValueError(f"parents must be a list of at most {_MOST_PARENTS:,}")
        if not isinstance(settings, dict):
            raise ValueError("settings must be an object")
        return Provenance(how, tuple(_parent(i, entry) for i, entry in enumerate(parents)), settings)


def _parent(i: int, record: object) -> Parent:
    if not isinstance(record, dict) or set(record) != {"name", "sha256", "weight"}:
        raise ValueError(f"parents[{i}] must be an object with name, sha256 and weight")
    name, sha256, weight = record["name"], record["sha256"], record["weight"]
    if not _is_text(name):
        raise ValueError(f"parents[{i}]: name is {show(name)}, not a name")
    if not isinstance(sha256, str) or (sha256 and not _SHA256.fullmatch(sha256)):
        raise ValueError(f"parents[{i}]: sha256 is {show(sha256)}, not a SHA-256")
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
    if weight is not None and not number:
        raise ValueError(f"parents[{i}]: weight is {show(weight)}, not a number")
    return Parent(name, sha256, weight)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MOST_TEXT
