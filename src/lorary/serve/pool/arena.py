"""Memory beside the base that adapters share with the keys and values of requests: equal sectors of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Arena(Protocol):
    """Equal sectors of one tensor. Only one thread uses it: the one that takes sectors for keys and values.

    Attributes:
        memory: [bytes] uint8, on the base's device.
        sector_bytes: bytes of a sector; sector i is `memory[i * sector_bytes : (i + 1) * sector_bytes]`.
        sectors: the numbers of those that can be taken at all.
    """

    memory: Tensor
    sector_bytes: int
    sectors: range

    def free(self) -> list[int]:
        """The sectors that nobody uses, in ascending order."""
        ...

    def take(self, sectors: Iterable[int]) -> None:
        """Use free sectors for adapters."""
        ...

    def give(self, sectors: Iterable[int]) -> None:
        """Return sectors that were taken."""
        ...

    def reclaim(self) -> bool:
        """Free the sectors that hold only what can be computed again; whether there were any."""
        ...

    def reclaimable(self) -> int:
        """Bytes that `reclaim` would free, at most."""
        ...


class PlainArena:
    """An arena for adapters alone.

    Args:
        size: bytes; rounded down to whole sectors.
        sector_bytes: bytes of a sector.
        device: the base's.
    """

    def __init__(self, size: int, sector_bytes: int = 2**16, device: torch.device | str = "cpu") -> None:
        self.sector_bytes, self.sectors = sector_bytes, range(size // sector_bytes)
        self.memory = torch.empty(len(self.sectors) * sector_bytes, dtype=torch.uint8, device=device)
        self._free = set(self.sectors)

    def free(self) -> list[int]:
        return sorted(self._free)

    def take(self, sectors: Iterable[int]) -> None:
        self._free -= set(sectors)

    def give(self, sectors: Iterable[int]) -> None:
        self._free |= set(sectors)

    def reclaim(self) -> bool:
        return False

    def reclaimable(self) -> int:
        return 0


class CacheArena:
    """The sectors of Transformers' paged cache, which hands them to requests from the high end of its list.

    Args:
        cache: a `PagedAttentionCache` of Transformers' continuous batching.
    """

    def __init__(self, cache: Any) -> None:
        self._cache, self._pool = cache, cache.pool
        self.memory, self.sector_bytes = cache.cache_tensor, cache.bytes_per_sector
        first = self._pool.num_reserved_sectors  # where padding reads and writes
        self.sectors = range(first, first + self._pool.num_sectors)
        self._taken = set[int]()
        self._reset: Callable[[], None] = self._pool.reset
        self._pool.reset = self._reset_requests

    def free(self) -> list[int]:
        self._pool.try_to_free_sectors()
        self._pool.free_sectors.sort()  # requests get the last one
        return list(self._pool.free_sectors)

    def take(self, sectors: Iterable[int]) -> None:
        taken = set(sectors)
        self._taken |= taken
        self._pool.free_sectors = [s for s in self._pool.free_sectors if s not in taken]

    def give(self, sectors: Iterable[int]) -> None:
        given = set(sectors)
        self._taken -= given
        self._pool.free_sectors = sorted([*self._pool.free_sectors, *given])

    def reclaim(self) -> bool:
        return bool(self._cache.evict_cached_blocks())

    def reclaimable(self) -> int:
        allocators = self._cache.cache_allocators.values()
        return sum(len(each.ledger.cached_blocks) * each.bytes_per_block for each in allocators)

    def _reset_requests(self) -> None:
        """The cache frees all sectors; those of adapters stay taken."""
        self._reset()
        self._pool.free_sectors = [s for s in self._pool.free_sectors if s not in self._taken]
