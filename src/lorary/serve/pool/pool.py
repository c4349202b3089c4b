"""The pool: adapters in the host's memory and, within one byte budget shared with keys and values, beside the base.

An adapter goes from disk to the host (`put`), from there beside the base when a batch needs it (`bring`), and leaves
either place when something else needs the room, the least recently used first. Requests hold it on the host from their
arrival to their end, and a batch refers to it beside the base: what is held or referred to stays.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from lorary.errors import Diagnostic, FileError
from lorary.serve.forms.flat import Flat
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.pool.arena import Arena
from lorary.serve.pool.device_tier import DeviceTier
from lorary.serve.pool.host_tier import HostTier
from lorary.serve.pool.space import Space

_EVENTS = 1000


class Event(NamedTuple):
    """An event of the pool, for tests and a look at what it did.

    Args:
        what: "put" on the host, "forget" there for room, "bring" beside the base, "hit" when it was there already,
            "evict" from there, "drop" from the host after an unload.
        uid: the adapter, or the key of shared tensors.
        bytes: that were moved or freed.
    """

    what: str
    uid: str
    bytes: int


class Pool:
    """Adapters on the host and beside the base.

    `bring`, `release`, `make_room` and `memory` belong to the arena's thread; the rest may be called from any.

    Args:
        arena: the memory beside the base.
        host_bytes: bytes of adapters on the host at most.
        keep: sectors of the arena that adapters never take.
    """

    def __init__(self, arena: Arena, *, host_bytes: int, keep: int = 0) -> None:
        self.space, self._host = Space(arena, keep), HostTier(host_bytes)
        self._device = DeviceTier(self.space, self._host.pinned, self._record)
        self._lock = threading.RLock()
        self._dropped = set[str]()  # to be evicted when nothing refers to them
        self._events = deque[Event](maxlen=_EVENTS)
        self._counts = Counter[str]()

    # --- on the host --------------------------------------------------------------------------------------------------

    def put(self, uid: str, flat: Flat) -> None:
        """Keep an adapter on the host, held once: `unhold` undoes that.

        Raises:
            FileError: it is larger than the budget.
            BusyError: adapters that requests hold leave no room for it.
        """
        with self._lock:
            self._check_size(uid, flat)
            if uid not in self._host.flats:
                for other, size in self._host.put(uid, flat):
                    self._record("forget", other, size)
                self._record("put", uid, flat.bytes)
            self._dropped.discard(uid)
            self.hold(uid)

    def hold(self, uid: str) -> bool:
        """Hold an adapter on the host; False if it is not there."""
        with self._lock:
            if uid not in self._host.flats:
                return False
            self._host.held[uid] += 1
            self._host.flats.move_to_end(uid)
            return True

    def unhold(self, uid: str) -> None:
        """Undo a `hold` or a `put`."""
        with self._lock:
            self._host.held[uid] -= 1
            if not self._host.held[uid]:
                del self._host.held[uid]
                if uid in self._dropped:
                    self._record("drop", uid, self._host.remove(uid))

    def pin(self, uid: str, pinned: bool = True) -> None:
        """Keep an adapter wherever it is, or no longer."""
        with self._lock:
            (self._host.pinned.add if pinned else self._host.pinned.discard)(uid)

    def drop(self, uid: str) -> None:
        """Forget an adapter as soon as no request holds it and no batch refers to it."""
        with self._lock:
            self._host.pinned.discard(uid)
            self._dropped.add(uid)
            if not self._host.held[uid] and uid in self._host.flats:
                self._record("drop", uid, self._host.remove(uid))

    def __contains__(self, uid: str) -> bool:
        """Whether an adapter is on the host."""
        return uid in self._host.flats

    # --- beside the base ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def bring(self, uid: str) -> ServingForm | None:
        """The serving form of an adapter that is held, with tensors beside the base, for a batch; `release` ends it.

        The copy is made on the current stream, on which the batches must be computed too.

        Returns:
            None if there is no room now: other batches must end, or requests free their keys and values.

        Raises:
            FileError: there will never be room for it beside the pinned adapters.
            KeyError: it is not on the host.
        """
        with self._lock:
            self._sweep()
            found = self._device.residents.get(uid)
            if found is not None:
                self._record("hit", uid, 0)
            else:
                found = self._device.place(uid, self._host.flats[uid])
            if found is None:
                return None
            found.references += 1
            self._device.residents.move_to_end(uid)
            return found.form

    def release(self, uid: str) -> None:
        """Undo a `bring`."""
        with self._lock:
            self._device.residents[uid].references -= 1
            self._device.residents.move_to_end(uid)
            self._sweep()

    def make_room(self, sectors: int) -> bool:
        """Evict adapters until so many sectors are free for keys and values; False, and nothing evicted, if in vain."""
        with self._lock:
            self._sweep()
            return self._device.make_room(sectors)

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def pinned(self) -> frozenset[str]:
        """The uids of adapters that stay wherever they are."""
        with self._lock:
            return frozenset(self._host.pinned)

    def resident(self, uid: str) -> bool:
        """Whether an adapter lies beside the base."""
        return uid in self._device.residents

    def residents(self) -> dict[str, int]:
        """uid -> bytes of the adapters beside the base, the least recently used first."""
        with self._lock:
            return {uid: r.run.size for uid, r in self._device.residents.items() if r.form is not None}

    def form(self, uid: str) -> ServingForm:
        """The serving form of an adapter on the host, with its tensors there."""
        return self._host.flats[uid].on_host

    def size(self, uid: str) -> int:
        """Bytes that an adapter on the host needs beside the base, with the shared tensors that are not there yet."""
        with self._lock:
            flat, there = self._host.flats[uid], self._device.residents
            return flat.bytes + sum(t.buffer.numel() for key, t in flat.shared.items() if key not in there)

    def memory(self, waiting: Collection[str]) -> dict[str, Any]:
        """The memory figures that the scheduling policy decides on, as `Admission.decide` takes them.

        Args:
            waiting: the uids that are waited for, on the host.
        """
        arena, most = self.space.arena, self.space.capacity - self.space.taken
        return {
            "free": min(len(arena.free()) * arena.sector_bytes + arena.reclaimable(), most),
            "resident": self.residents() | self._idle_shared(),
            "sizes": {uid: self.size(uid) for uid in waiting},
            "pinned": frozenset(uid for uid in self.pinned if self.resident(uid)),
        }

    def events(self) -> list[Event]:
        """The latest events, the oldest first."""
        with self._lock:
            return list(self._events)

    def statistics(self) -> dict[str, int]:
        """Figures of this moment, and counts since the start."""
        with self._lock:
            residents = list(self._device.residents.values())
            adapters = [r for r in residents if r.form is not None]
            return {
                "capacity_bytes": self.space.capacity,
                "taken_bytes": self.space.taken,
                "resident_bytes": sum(r.run.size for r in residents),
                "resident": len(adapters),
                "referenced": sum(1 for r in adapters if r.references),
                "host_capacity_bytes": self._host.limit,
                "host_bytes": self._host.used,
                "host": len(self._host.flats),
                "held": len(self._host.held),
                "loads": self._counts["bring"],
                "loaded_bytes": self._counts["bring bytes"],
                "hits": self._counts["hit"],
                "evictions": self._counts["evict"],
                "host_loads": self._counts["put"],
                "host_evictions": self._counts["forget"],
            }

    # --- inside -------------------------------------------------------------------------------------------------------

    def _idle_shared(self) -> dict[str, int]:
        """key -> bytes of the shared tensors beside the base that no batch needs: they give way like adapters."""
        with self._lock:
            residents = self._device.residents
            needed = {key for r in residents.values() if r.form is not None and r.references for key in r.shared}
            return {key: r.run.size for key, r in residents.items() if r.form is None and key not in needed}

    def _check_size(self, uid: str, flat: Flat) -> None:
        needed = flat.bytes + sum(t.buffer.numel() for t in flat.shared.values())
        most = min(self.space.capacity, self._host.limit)
        if needed > most:
            what = f"it needs {needed:,} bytes in memory, and at most {most:,} are there for adapters"
            fix = "give the server a larger budget"
            raise FileError("cannot serve the adapter:", [Diagnostic(uid[:12], what, fix)])

    def _sweep(self) -> None:
        """Evict the dropped adapters that nothing refers to."""
        for uid in [u for u in self._dropped if not self._host.held[u]]:
            resident = self._device.residents.get(uid)
            if resident is None or not resident.references:
                self._dropped.discard(uid)
                if resident is not None:
                    self._device.evict(uid)

    def _record(self, what: str, uid: str, size: int) -> None:
        self._events.append(Event(what, uid, size))
        self._counts[what] += 1
        self._counts[f"{what} bytes"] += size
