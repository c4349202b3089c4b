"""The settings of the HTTP server: keys, the root of the adapters, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The settings of the HTTP server.

    Args:
        keys: key -> the tenant whose key it is. Without any key, the server asks for none.
        admin_keys: keys that may also load and unload adapters.
        local: only this machine reaches the server, without keys: other host names in requests are refused, as a web
            page sends them whose author lets its name resolve to this machine (DNS rebinding).
        root: the folder below which adapters may be loaded at run time; None for no loading at all.
        body_bytes: of a request at most.
        body_seconds: for the arrival of a request at most, headers and body.
        headers: of a request at most.
        connections: at a time at most; fewer if the process may not open so many files.
        choices: answers to one request at most: its prompts times `n`.
        adapters: of one request at most.
        drain: seconds that running requests get to end when the server stops.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    admin_keys: frozenset[str] = frozenset()
    local: bool = False
    root: Path | None = None
    body_bytes: int = 4 * MIB
    body_seconds: float = 30.0
    headers: int = 100
    connections: int = 2000
    choices: int = 128
    adapters: int = 16
    drain: float = 30.0

    @property
    def guarded(self) -> bool:
        """Whether requests need a key."""
        return bool(self.keys or self.admin_keys)
