"""The adapters beside the base: copies in an arena, of which the least recently used give way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field

from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.serve.forms.flat import Flat
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.pool.space import Run, Space


@dataclass
class Resident:
    """A copy beside the base: an adapter with its form, or shared tensors.

    Args:
        run: where.
        form: of an adapter.
        tensors: role -> tensor, if it is shared tensors.
        shared: keys of the shared tensors that an adapter uses.
        references: of batches to an adapter; of adapters to shared tensors.
    """

    run: Run
    form: ServingForm | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    references: int = 0


class DeviceTier:
    """Adapters beside the base. Not for several threads: the pool has the lock.

    Args:
        space: where they are put.
        pinned: the uids of those that stay.
        record: is told "bring" or "evict", the uid or the key of shared tensors, and the bytes.
    """

    def __init__(self, space: Space, pinned: Set[str], record: Callable[[str, str, int], None]) -> None:
        self.space, self._pinned, self._record = space, pinned, record
        self.residents = OrderedDict[str, Resident]()  # the least recently used first

    def place(self, uid: str, flat: Flat) -> Resident | None:
        """Copy an adapter, and the shared tensors that it needs, beside the base; None if there is no room now.

        Raises:
            FileError: there will never be room for it beside the pinned adapters.
        """
        self._check_place(uid, flat)
        tensors = {}
        for key, shared in flat.shared.items():
            placed = self.residents.get(key) or self._copy(key, shared.buffer, flat.shared)
            if placed is None:
                return None
            placed.tensors = placed.tensors or shared.views(self._memory(placed.run, shared.buffer))
            tensors[key] = placed.tensors
        placed = self._copy(uid, flat.buffer, flat.shared)
        if placed is None:
            return None
        placed.form, placed.shared = flat.views(self._memory(placed.run, flat.buffer), tensors), tuple(flat.shared)
        for key in flat.shared:
            self.residents[key].references += 1
            self.residents.move_to_end(key)
        return placed

    def make_room(self, sectors: int) -> bool:
        """Evict adapters until so many sectors are free; False, and nothing evicted, if in vain."""
        missing = sectors - len(self.space.arena.free())
        leaving, runs = list[str](), list[Run]()
        candidates = self._evictable()
        while self.space.freed_by(runs) < missing:
            uid = next(candidates, None)
            if uid is None:
                return False
            leaving.append(uid)
            runs.append(self.residents[uid].run)
        for uid in leaving:
            self.evict(uid)
        return True

    def evict(self, uid: str) -> None:
        """Give up the copy of an adapter that nothing refers to, or of shared tensors."""
        resident = self.residents.pop(uid)
        for key in resident.shared:
            self.residents[key].references -= 1
        self.space.vacate(resident.run)
        self._record("evict", uid, resident.run.size)

    def _check_place(self, uid: str, flat: Flat) -> None:
        """Refuse an adapter that pinned ones leave no place for, ever."""
        pinned = [r.run for u, r in self.residents.items() if u in self._pinned]
        passing = {r.run for r in self.residents.values()}.difference(pinned)
        largest = max([flat.bytes, *(t.buffer.numel() for t in flat.shared.values())])
        if pinned and self.space.find(largest, passing, ever=True) is None:
            taken, capacity = sum(run.size for run in pinned), self.space.capacity
            what = f"it needs {largest:,} bytes in one piece, and of {capacity:,} pinned adapters take {taken:,}"
            fix = "unpin adapters, or give them a larger budget"
            raise FileError("cannot serve the adapter:", [Diagnostic(uid[:12], what, fix)])

    def _copy(self, uid: str, buffer: Tensor, protected: Collection[str]) -> Resident | None:
        """Copy a buffer beside the base, if need be in the place of others, but of nothing protected."""
        size = max(buffer.numel(), 1)
        run = self._find(size, protected)
        if run is None and self.space.arena.reclaim():
            run = self._find(size, protected)
        if run is None:
            return None
        for other in [u for u, r in self.residents.items() if r.run.overlaps(run)]:
            for user in [u for u, r in self.residents.items() if other in r.shared]:
                self.evict(user)
            if other in self.residents:
                self.evict(other)
        self.space.occupy(run)
        self._memory(run, buffer).copy_(buffer, non_blocking=True)
        self.residents[uid] = Resident(run)
        self._record("bring", uid, buffer.numel())
        return self.residents[uid]

    def _find(self, size: int, protected: Collection[str]) -> Run | None:
        """A run of this size: free, or else the one that the fewest evictions in order of use make free."""
        if found := self.space.find(size):
            return found
        leaving = [self.residents[uid].run for uid in self._evictable(protected)]
        low, high, best = 1, len(leaving), self.space.find(size, leaving) if leaving else None
        while best is not None and low < high:
            middle = (low + high) // 2
            found = self.space.find(size, leaving[:middle])
            low, high, best = (low, middle, found) if found else (middle + 1, high, best)
        return best

    def _evictable(self, protected: Collection[str] = ()) -> Iterator[str]:
        """What nothing refers to, the least recently used first; shared tensors after the adapters that use them."""
        users = {uid: r.references for uid, r in self.residents.items() if r.form is None}
        for uid, resident in self.residents.items():
            if resident.references or uid in self._pinned or uid in protected:
                continue
            yield uid
            for key in resident.shared:
                users[key] -= 1
                if not users[key] and key not in protected:
                    yield key

    def _memory(self, run: Run, buffer: Tensor) -> Tensor:
        return self.space.arena.memory[run.start : run.start + buffer.numel()]
