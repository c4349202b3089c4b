"""The scheduling policy: which waiting requests join the batch. A pure function over a snapshot.

Between tenants it is fair by virtual token counters (Sheng et al., "Fairness in Serving Large Language Models",
arXiv:2401.00588): the next request is the oldest one of the tenant whose counter is lowest, and what runs counts with
all that it may still compute. A request that lacks an adapter slot or memory is passed over by those behind it, which
is what clusters a batch by adapter (S-LoRA, arXiv:2311.03285), until it has waited for `patience`. From then on:

- lacking a slot: no further adapter joins the batch, and the adapter whose requests end first takes no more of them, if
  it has been in the batch for `patience`;
- lacking memory: nothing behind it is admitted.

So the next request in turn is admitted at the latest 2 `patience` + 2 L after it arrived or became the next one, where
L is the longest time that a request runs: after 2 `patience` every adapter in the batch may be closed, after L more one
of them is gone, and after another L everything that ran is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.serve.engine import RequestError


@dataclass(frozen=True)
class Policy:
    """The settings of the policy.

    Args:
        max_running: requests in the batch at most.
        max_adapters: distinct adapters in the batch at most.
        patience: seconds for which a request may be passed over, and for which an adapter may stay in the batch while
            others wait for its place.
        token_bytes: bytes of keys and values for each token of a request; 0 if others see to their memory.
        budget: bytes of adapters, keys and values together; None for no limit of its own: only `Snapshot.free` counts.
        input_weight, output_weight: what a token of the prompt, and a generated one, adds to a tenant's counter.
    """

    max_running: int = 64
    max_adapters: int = 32
    patience: float = 2.0
    token_bytes: int = 0
    budget: int | None = None
    input_weight: float = 1.0
    output_weight: float = 2.0

    def __post_init__(self) -> None:
        lows: dict[str, tuple[float | None, float]] = {
            "max_running": (self.max_running, 1),
            "max_adapters": (self.max_adapters, 1),
            "patience": (self.patience, 0),
            "token_bytes": (self.token_bytes, 0),
            "budget": (self.budget, 1),
            "input_weight": (self.input_weight, 0),
            "output_weight": (self.output_weight, 0),
        }
        problems = [
            Diagnostic(name, f"is {value}, and must be a number from {low}")
            for name, (value, low) in lows.items()
            if value is not None and not (low <= value < math.inf)
        ]
        if not problems and not self.input_weight + self.output_weight:
            problems = [
                Diagnostic("input_weight, output_weight", "are both 0: no tenant would ever have had its share")
            ]
        if problems:
            raise ConfigError("invalid scheduling policy:", problems)

    def weigh(self, prompt: float, generated: float) -> float:
        """What tokens add to a tenant's counter."""
        return self.input_weight * prompt + self.output_weight * generated


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
        prompt: those of them that are left to compute, the prompt's.
    """

    id: str
    adapters: tuple[str, ...] = ()
    tenant: str = ""
    arrived: float = 0.0
    deadline: float | None = None
    tokens: int = 0
    prompt: int = 0

    def __post_init__(self) -> None:
        if 0 <= self.prompt <= self.tokens and self.arrived == self.arrived and self.deadline == self.deadline:
            if not self.adapters or list(self.adapters) == sorted(set(self.adapters)):
                return
        raise RequestError(f"invalid request {self.id!r}:", _why_invalid(self))


def _why_invalid(request: Pending) -> list[Diagnostic]:
    problems = []
    if request.tokens < 0:
        problems.append(Diagnostic("tokens", f"is {request.tokens}, and must not be negative"))
    if not 0 <= request.prompt <= max(request.tokens, 0):
        problems.append(Diagnostic("prompt", f"is {request.prompt}, and must be from 0 to tokens, {request.tokens}"))
    if list(request.adapters) != sorted(set(request.adapters)):
        problems.append(Diagnostic("adapters", f"are {list(request.adapters)}, and must be sorted, each once"))
    for name, value in (("arrived", request.arrived), ("deadline", request.deadline)):
        if value != value:
            problems.append(Diagnostic(name, "is not a number"))
    return problems


@dataclass(frozen=True)
class Snapshot:
    """What the policy decides on.

    Args:
        now: the clock, in seconds.
        waiting: the requests whose adapters are in memory, in order of arrival.
        running: the requests in the batch.
        resident: uid -> bytes of the adapters beside the base, in use or not, least recently used first.
        sizes: uid -> bytes of every adapter that is waited for.
        free: bytes that are free for adapters and for keys and values, beside what can be evicted. What the running
            requests may still take is not free.
        served: tenant -> tokens served so far, weighted.
        since: uid -> when an adapter in the batch joined it; one that is not named may be closed at any time.
        pinned: uids that are never evicted.
    """

    now: float
    waiting: Sequence[Pending]
    running: Sequence[Pending] = ()
    resident: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    served: Mapping[str, float] = field(default_factory=dict)
    since: Mapping[str, float] = field(default_factory=dict)
    pinned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decision:
    """What the policy has decided.

    Args:
        admit: the ids to take into the batch, in order.
        expired: the ids whose deadline has passed.
        evict: uids to evict for them, in order.
        refused: id -> why it can never be admitted.
        until: when it is worth asking again although no request came or ended and no memory became free.
    """

    admit: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    until: float = math.inf


def why_never(request: Pending, policy: Policy, sizes: Mapping[str, int], pinned: Mapping[str, int]) -> str:
    """Why a request can never be admitted; empty if it can.

    Args:
        sizes: uid -> bytes of its adapters.
        pinned: uid -> bytes of what is never evicted.
    """
    reasons = []
    if len(request.adapters) > policy.max_adapters:
        reasons.append(f"it has {len(request.adapters)} adapters, and a batch takes {policy.max_adapters}")
    others = sum(size for uid, size in pinned.items() if uid not in request.adapters)
    own = sum(sizes[uid] for uid in request.adapters)
    needed = own + request.tokens * policy.token_bytes
    if policy.budget is not None and needed > policy.budget - others:
        beside = f" beside {others:,} of pinned adapters" if others else ""
        reasons.append(
            f"it needs {needed:,} bytes, {own:,} of them for its adapters, and the budget is {policy.budget:,}{beside}"
        )
    return "; ".join(reasons)


def decide(snapshot: Snapshot, policy: Policy = Policy()) -> Decision:
    """Which waiting requests join the batch, which are too late, and which adapters make room.

    Equal snapshots give equal decisions. The time is that of a few passes over what waits, and O(log tenants) for each
    request that is admitted.

    >>> waiting = [Pending("a", ("x",)), Pending("b", ("y",)), Pending("c", ("x",))]
    >>> decide(Snapshot(0, waiting, sizes={"x": 1, "y": 1}, free=2), Policy(max_adapters=1)).admit
    ('a', 'c')

    Raises:
        StateError: the snapshot has no size for an adapter.
    """
    if not snapshot.waiting:
        return Decision()
    now = snapshot.now
    expired = tuple(p.id for p in snapshot.waiting if p.deadline is not None and p.deadline <= now)
    if len(snapshot.running) >= policy.max_running:
        return Decision(expired=expired, until=_next(now, (p.deadline for p in snapshot.waiting)))
    queues: dict[str, list[Pending]] = {}
    for request in snapshot.waiting:
        if request.deadline is None or request.deadline > now:
            queues.setdefault(request.tenant, []).append(request)
    batch = _Batch(snapshot, policy)
    _fill(batch, queues)
    times = (
        t for p in snapshot.waiting if p.id not in batch.admitted for t in (p.deadline, p.arrived + policy.patience)
    )
    until = min(_next(now, times), _next(now, (t + policy.patience for t in batch.since.values())))
    return Decision(tuple(batch.admitted), expired, tuple(batch.evictions()), batch.refused, until)


def _next(now: float, times: Iterable[float | None]) -> float:
    """The first time that is to come."""
    return min((t for t in times if t is not None and t > now), default=math.inf)


def _fill(batch: _Batch, queues: Mapping[str, Sequence[Pending]]) -> None:
    """Admit in turn: the oldest request that may of the tenant that has had least."""
    turns = [(batch.counter(tenant), queue[0].arrived, tenant) for tenant, queue in queues.items()]
    heapq.heapify(turns)
    left = {tenant: iter(queue) for tenant, queue in queues.items()}
    while turns and batch.places and not batch.full:
        _, arrived, tenant = turns[0]
        if batch.admit_one(left[tenant]):
            heapq.heapreplace(turns, (batch.counter(tenant), arrived, tenant))
        else:
            heapq.heappop(turns)


class _Batch:
    """The batch as the decision fills it."""

    def __init__(self, snapshot: Snapshot, policy: Policy) -> None:
        self.snapshot, self.policy = snapshot, policy
        self.left: dict[str, int] = {}  # uid in the batch -> tokens until the last of its requests ends
        self.counters = dict(snapshot.served)
        for request in snapshot.running:
            self._count(request)
        self.since = {uid: snapshot.since.get(uid, -math.inf) for uid in self.left}
        pinned = snapshot.pinned
        self.idle = {uid: n for uid, n in snapshot.resident.items() if uid not in self.left and uid not in pinned}
        self.room = snapshot.free + sum(self.idle.values())  # bytes, if everything idle were evicted
        self.taken = 0  # bytes of keys, values and adapters that were not resident
        self.places = policy.max_running - len(snapshot.running)
        self.admitted: dict[str, None] = {}
        self.refused: dict[str, str] = {}
        self.reserved = self.full = False
        self.closing: frozenset[str] = frozenset()

    def counter(self, tenant: str) -> float:
        return self.counters.get(tenant, 0.0)

    def admit_one(self, queue: Iterator[Pending]) -> bool:
        """Admit the first request of a tenant's queue that may be; False if none may."""
        policy, now = self.policy, self.snapshot.now
        for request in queue:
            lacks = self._lacks(request)
            if not lacks:
                self._take(request)
                return True
            if reason := self._why_never(request):
                self.refused[request.id] = reason
            elif request.arrived + policy.patience <= now:
                if lacks == "memory":
                    self.full = True
                    return False
                self._reserve(request)
        return False

    def evictions(self) -> Iterator[str]:
        """The adapters to evict: the least recently used, those that a waiting request names after all others."""
        missing = self.taken - self.snapshot.free
        if missing <= 0:
            return
        wanted = {uid for request in self.snapshot.waiting for uid in request.adapters}
        for uid in sorted(self.idle, key=wanted.__contains__):
            if missing <= 0:
                return
            missing -= self.idle[uid]
            yield uid

    def _lacks(self, request: Pending) -> Literal["", "slot", "memory"]:
        if request.adapters:
            new = sum(uid not in self.left for uid in request.adapters)
            if new and (self.reserved or len(self.left) + new > self.policy.max_adapters):
                return "slot"
            if not self.closing.isdisjoint(request.adapters):
                return "slot"
        return "memory" if self._bytes(request) > self.room else ""

    def _bytes(self, request: Pending) -> int:
        """What its admission takes of the room, in which everything idle counts as evicted."""
        own = request.tokens * self.policy.token_bytes
        for uid in request.adapters:
            if uid not in self.left and uid not in self.snapshot.pinned:
                own += self._size(uid)
        return own

    def _size(self, uid: str) -> int:
        size = self.snapshot.resident.get(uid, self.snapshot.sizes.get(uid))
        if size is None:
            raise StateError("invalid snapshot:", [Diagnostic(uid, "is waited for, and its size is not given")])
        return size

    def _take(self, request: Pending) -> None:
        self.room -= self._bytes(request)
        self.taken += request.tokens * self.policy.token_bytes
        for uid in request.adapters:
            if uid not in self.left:
                self.since[uid] = self.snapshot.now
                if self.idle.pop(uid, None) is None and uid not in self.snapshot.pinned:
                    self.taken += self._size(uid)
        self._count(request)
        self.places -= 1
        self.admitted[request.id] = None

    def _count(self, request: Pending) -> None:
        """Note what a request that runs may still compute."""
        for uid in request.adapters:
            self.left[uid] = max(self.left.get(uid, 0), request.tokens)
        rest = self.policy.weigh(request.prompt, request.tokens - request.prompt)
        self.counters[request.tenant] = self.counter(request.tenant) + rest

    def _reserve(self, request: Pending) -> None:
        """Keep the slots for a request that has waited long enough, and close as many adapters as it lacks."""
        if self.reserved:
            return
        self.reserved = True
        own, oldest = set(request.adapters), self.snapshot.now - self.policy.patience
        lacks = len(own.difference(self.left)) - (self.policy.max_adapters - len(self.left))
        others = [uid for uid in self.left if uid not in own and self.since[uid] <= oldest]
        self.closing = frozenset(heapq.nsmallest(lacks, others, key=lambda uid: (self.left[uid], uid)))

    def _why_never(self, request: Pending) -> str:
        snapshot = self.snapshot
        pinned = {uid: snapshot.resident.get(uid, 0) for uid in snapshot.pinned}
        return why_never(request, self.policy, {**snapshot.sizes, **snapshot.resident}, pinned)
