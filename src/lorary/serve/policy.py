"""The scheduling policy: which waiting requests join the batch. A pure function over a snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pending:
    """A request that waits, or runs.

    Args:
        id: the request.
        adapters: the uids of its adapters, sorted; empty for the base.
        tenant: whose it is.
        arrived: seconds on the clock of `Snapshot.now`.
        deadline: the time by which it must have begun; None for none.
        tokens: those left to compute and to generate, at most.
    """

    id: str
    adapters: tuple[str, ...] = ()
    tenant: str = ""
    arrived: float = 0.0
    deadline: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What the policy decides on.

    Args:
        now: the clock, in seconds.
        waiting: the requests whose adapters are in memory, in order of arrival.
        running: the requests in the batch.
        resident: uid -> bytes of the adapters beside the base, in use or not, least recently used first.
        sizes: uid -> bytes of every adapter that is waited for.
        free: bytes that are free for adapters and for keys and values, beside what can be evicted.
        served: tenant -> tokens served so far, weighted.
    """

    now: float
    waiting: Sequence[Pending]
    running: Sequence[Pending] = ()
    resident: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    served: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What the policy has decided.

    Args:
        admit: the ids to take into the batch, in order.
        expired: the ids whose deadline has passed.
        evict: uids to evict for them, in order.
    """

    admit: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
