"""Places for adapters in an arena: contiguous, as low as possible, several in a sector if they are small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lorary.serve.pool.arena import Arena

ALIGNMENT = 128  # bytes: a cache line of a GPU


class Run(NamedTuple):
    """Bytes of the arena: [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: Run) -> bool:
        return self.start < other.stop and other.start < self.stop


class Space:
    """The runs that adapters occupy; the first in a sector takes it from the arena, the last returns it.

    Args:
        arena: where the runs are.
        keep: sectors that are always left to the keys and values.
    """

    def __init__(self, arena: Arena, keep: int = 0) -> None:
        self.arena, self.keep = arena, keep
        self._runs = set[Run]()
        self._users = Counter[int]()  # sector -> runs in it

    @property
    def capacity(self) -> int:
        """Bytes that runs can ever occupy."""
        return max(len(self.arena.sectors) - self.keep, 0) * self.arena.sector_bytes

    @property
    def taken(self) -> int:
        """Bytes of the sectors that are taken."""
        return len(self._users) * self.arena.sector_bytes

    def find(self, size: int, ignoring: Collection[Run] = (), *, ever: bool = False) -> Run | None:
        """The lowest run of this size that is free; None if there is none.

        Args:
            size: bytes.
            ignoring: occupied runs that count as free.
            ever: whether sectors that keys and values use count as free too.
        """
        usable = self.arena.sectors if ever else sorted({*self.arena.free(), *self._users})
        staying = sorted(self._runs.difference(ignoring))
        kept = {s for run in staying for s in self._sectors(run)}
        most = len(self.arena.sectors) - self.keep - len(kept)
        for start, stop in self._gaps(usable, staying):
            run = Run(start, start + size)
            if run.stop <= stop and len(set(self._sectors(run)) - kept) <= most:
                return run
        return None

    def occupy(self, run: Run) -> None:
        """Take a run that `find` returned, and the sectors that it needs."""
        new = [s for s in self._sectors(run) if not self._users[s]]
        self.arena.take(new)
        self._users.update(self._sectors(run))
        self._runs.add(run)

    def vacate(self, run: Run) -> None:
        """Return a run, and the sectors that nothing else is in."""
        self._runs.remove(run)
        self._users.subtract(self._sectors(run))
        empty = [s for s in self._sectors(run) if not self._users[s]]
        for sector in empty:
            del self._users[sector]
        self.arena.give(empty)

    def freed_by(self, vacating: Collection[Run]) -> int:
        """The number of sectors that would be free without these runs."""
        left = self._users.copy()
        for run in vacating:
            left.subtract(self._sectors(run))
        return sum(1 for n in left.values() if not n)

    def _sectors(self, run: Run) -> range:
        return range(run.start // self.arena.sector_bytes, -(-run.stop // self.arena.sector_bytes))

    def _gaps(self, usable: Collection[int], staying: list[Run]) -> Iterator[Run]:
        """The free runs between those that stay, aligned, in ascending order."""
        size, runs = self.arena.sector_bytes, iter([*staying, Run(2**63, 2**63)])
        run = next(runs)
        for low, high in _consecutive(usable):
            start, end = low * size, high * size
            while run.start < end:
                if start < run.start:
                    yield Run(start, run.start)
                start = -(-run.stop // ALIGNMENT) * ALIGNMENT
                run = next(runs)
            if start < end:
                yield Run(start, end)


def _consecutive(numbers: Collection[int]) -> Iterator[tuple[int, int]]:
    """[first, last + 1) of each group of consecutive numbers."""
    first = last = -2
    for n in numbers:
        if n != last + 1:
            if first >= 0:
                yield first, last + 1
            first = n
        last = n
    if first >= 0:
        yield first, last + 1
