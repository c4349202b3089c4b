"""The adapters on the host: within a limit, the least recently used leave first, those in use never."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import replace

from lorary.errors import Diagnostic
from lorary.serve.forms.flat import Flat, FlatTensors
from lorary.serve.interface import BusyError


class HostTier:
    """Adapters on the host. Shared tensors are kept, and count, once. Not for several threads: the pool has the lock.

    Args:
        limit: bytes at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.flats = OrderedDict[str, Flat]()  # the least recently used first
        self.held = Counter[str]()
        self.pinned = set[str]()
        self._shared: dict[str, FlatTensors] = {}
        self._users = Counter[str]()  # key of shared tensors -> adapters

    def put(self, uid: str, flat: Flat) -> list[tuple[str, int]]:
        """Keep an adapter.

        Returns:
            (uid, bytes) of those that had to leave.

        Raises:
            BusyError: those in use leave no room for it; nothing has left.
        """
        leaving, most = list[str](), self.limit - self._added_by(flat)
        for other in self.flats:
            if self._used_without(leaving) <= most:
                break
            if not self.in_use(other):
                leaving.append(other)
        if (busy := self._used_without(leaving)) > most:
            what = f"it needs {flat.bytes:,} bytes, and adapters in use take {busy:,} of {self.limit:,}"
            raise BusyError("no room for the adapter now:", [Diagnostic("", what, "ask again later")])
        left = [(other, self.remove(other)) for other in leaving]
        shared = {key: self._shared.setdefault(key, tensors) for key, tensors in flat.shared.items()}
        self.used += flat.bytes + sum(t.buffer.numel() for key, t in shared.items() if not self._users[key])
        self._users.update(shared.keys())
        self.flats[uid] = replace(flat, shared=shared)
        return left

    def remove(self, uid: str) -> int:
        """Forget an adapter; the bytes that it had for itself, 0 if it is not here."""
        flat = self.flats.pop(uid, None)
        if flat is None:
            return 0
        self.used -= flat.bytes
        for key in flat.shared:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self.used -= self._shared.pop(key).buffer.numel()
        return flat.bytes

    def in_use(self, uid: str) -> bool:
        return uid in self.pinned or self.held[uid] > 0

    def _added_by(self, flat: Flat) -> int:
        return flat.bytes + sum(t.buffer.numel() for key, t in flat.shared.items() if key not in self._shared)

    def _used_without(self, leaving: list[str]) -> int:
        """Bytes without some adapters. Their shared tensors count still: a newcomer often shares them."""
        return self.used - sum(self.flats[uid].bytes for uid in leaving)
