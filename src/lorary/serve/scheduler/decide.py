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
from collections.abc import Iterable, Iterator
from typing import Literal

from lorary.errors import Diagnostic, StateError
from lorary.serve.scheduler.pending import Pending, Waiting
from lorary.serve.scheduler.policy import Decision, Policy, Snapshot, why_never

_MOST_PASSED_OVER = 64  # for want of memory, in one decision: a look at thousands would cost more than it finds


def decide(snapshot: Snapshot, policy: Policy) -> Decision:
    """Which waiting requests join the batch, and which are too late.

    Equal snapshots give equal decisions. Where slots are what is short, the time does not depend on how many requests
    wait: the index is asked for those that have an adapter of the batch.

    >>> waiting = Waiting([Pending("a", ("x",)), Pending("b", ("y",)), Pending("c", ("x",))])
    >>> decide(Snapshot(0, waiting, sizes={"x": 1, "y": 1}, free=2), Policy(max_adapters=1)).admit
    ('a', 'c')

    Raises:
        StateError: the snapshot has no size for an adapter.
    """
    waiting, now = snapshot.waiting, snapshot.now
    if not waiting:
        return Decision()
    expired, until = waiting.expired(now), waiting.next_deadline(now)
    if len(snapshot.running) >= policy.max_running:
        return Decision(expired=expired, until=until)
    batch = _Batch(snapshot, policy)
    turns = [(batch.counter(tenant), oldest.arrived, tenant) for tenant, oldest in waiting.tenants.items()]
    heapq.heapify(turns)
    late = frozenset(expired)
    left = {tenant: _in_turn(waiting, tenant, batch, late) for _, _, tenant in turns}
    while turns and batch.places and not batch.full:
        _, arrived, tenant = turns[0]
        if batch.admit_one(left[tenant]):
            heapq.heapreplace(turns, (batch.counter(tenant), arrived, tenant))
        else:
            heapq.heappop(turns)
    until = min(until, batch.until) if batch.places else until
    return Decision(tuple(batch.admitted), expired, batch.refused, until)


def _in_turn(waiting: Waiting, tenant: str, batch: _Batch, late: frozenset[str]) -> Iterator[Pending]:
    """A tenant's requests in order of arrival.

    When no adapter can join the batch any more and the first request has been passed over for it, those that follow are
    looked up by the adapters of the batch.
    """
    passed = None  # the number of the first request that was passed over
    for number, request in waiting.in_order(tenant):
        if request.id in late:
            continue
        yield request
        if batch.slots_are_out and request.id not in batch.admitted and request.id not in batch.refused:
            passed = number
            break

    if passed is not None:
        groups = waiting.groups_within(tenant, batch.left)
        for number, request in heapq.merge(*(_open(batch, adapters, group) for adapters, group in groups)):
            if number > passed and request.id not in late:
                yield request


def _open(
    batch: _Batch, adapters: tuple[str, ...], group: Iterable[tuple[int, Pending]]
) -> Iterator[tuple[int, Pending]]:
    """A group of requests for as long as none of its adapters is closed."""
    for item in group:
        if not batch.closing.isdisjoint(adapters):
            return
        yield item


class _Batch:
    """The batch as the decision fills it."""

    def __init__(self, snapshot: Snapshot, policy: Policy) -> None:
        self.snapshot, self.policy = snapshot, policy
        self.left: dict[str, int] = {}  # uid in the batch -> tokens until the last of its requests ends
        self.counters = dict(snapshot.served)
        for request in snapshot.running:
            self._count(request)
        self.since = {uid: snapshot.since.get(uid, -math.inf) for uid in self.left}
        self.staying = snapshot.pinned.intersection(snapshot.resident)
        idle = snapshot.resident.keys() - self.left.keys() - self.staying
        self.room = snapshot.free + sum(snapshot.resident[uid] for uid in idle)  # bytes, if these were evicted
        self.places = policy.max_running - len(snapshot.running)
        self.admitted: dict[str, None] = {}
        self.refused: dict[str, str] = {}
        self.reserved = self.full = False
        self.short = 0  # requests that were passed over for want of memory
        self.closing: frozenset[str] = frozenset()
        self.until = math.inf  # when somebody has waited for long enough, or an adapter may be closed

    @property
    def slots_are_out(self) -> bool:
        """Whether no adapter can join the batch any more."""
        return self.reserved or len(self.left) >= self.policy.max_adapters

    def counter(self, tenant: str) -> float:
        return self.counters.get(tenant, 0.0)

    def admit_one(self, queue: Iterator[Pending]) -> bool:
        """Admit the first request of a tenant's queue that may be; False if none may."""
        for request in queue:
            lacks = self._lacks(request)
            if not lacks:
                self._take(request)
                return True
            if reason := self._why_never(request):
                self.refused[request.id] = reason
                continue
            overdue = request.arrived + self.policy.patience
            if overdue > self.snapshot.now:
                self.until = min(self.until, overdue)
            if lacks == "memory":
                self.short += 1
                self.full = overdue <= self.snapshot.now or self.short > _MOST_PASSED_OVER
            elif overdue <= self.snapshot.now and not self.reserved:
                self._reserve(request)
            if self.full:
                break
        return False

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
        return sum(self._size(uid) for uid in request.adapters if uid not in self.left and uid not in self.staying)

    def _size(self, uid: str) -> int:
        size = self.snapshot.resident.get(uid, self.snapshot.sizes.get(uid))
        if size is None:
            raise StateError("invalid snapshot:", [Diagnostic(uid, "is waited for, and its size is not given")])
        return size

    def _take(self, request: Pending) -> None:
        self.room -= self._bytes(request)
        self.since |= {uid: self.snapshot.now for uid in request.adapters if uid not in self.left}
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
        self.reserved = True
        own, patience, now = set(request.adapters), self.policy.patience, self.snapshot.now
        lacks = len(own.difference(self.left)) - (self.policy.max_adapters - len(self.left))
        others = [uid for uid in self.left if uid not in own]
        old = [uid for uid in others if self.since[uid] + patience <= now]
        self.closing = frozenset(heapq.nsmallest(lacks, old, key=lambda uid: (self.left[uid], uid)))
        if len(old) < lacks:
            self.until = min([self.until, *(self.since[uid] + patience for uid in others if uid not in old)])

    def _why_never(self, request: Pending) -> str:
        own = sum(map(self._size, request.adapters))
        others = sum(self.snapshot.resident[uid] for uid in self.staying.difference(request.adapters))
        return why_never(request, self.policy, own, others)
