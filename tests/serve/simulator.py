"""A discrete-event simulation of an engine: a virtual clock, a cost model, and the real policy.

Every step computes the prompts of the requests that were just admitted and one token of the others. What must hold at
every step is asserted here: the limits of the policy, and that the adapters in use leave room for those that join.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from lorary.serve.scheduler.admission import Admission
from lorary.serve.scheduler.decide import decide
from lorary.serve.scheduler.pending import Pending
from lorary.serve.scheduler.policy import Decision, Policy, Snapshot


class Arrival(NamedTuple):
    """A request of the workload: `ends_after` of at most `generated` tokens."""

    at: float
    adapters: tuple[str, ...] = ()
    tenant: str = ""
    prompt: int = 32
    generated: int = 32
    ends_after: int = 32
    deadline: float | None = None  # seconds after its arrival


@dataclass(frozen=True)
class Cost:
    """Seconds: of a step, of its tokens, of each distinct adapter in it, and of each byte that is loaded."""

    step: float = 0.01
    prompt_token: float = 5e-5
    row: float = 3e-4
    adapter: float = 2e-4
    byte: float = 1e-9

    def of(self, rows: int, prompt_tokens: int, adapters: int, loaded: int) -> float:
        rest = self.prompt_token * prompt_tokens + self.adapter * adapters + self.byte * loaded
        return self.step + self.row * rows + rest


@dataclass
class Outcome:
    """What became of a request: the times of its events, None for those that never came."""

    arrival: Arrival
    admitted: float | None = None
    ended: float | None = None
    expired: float | None = None
    refused: str = ""

    @property
    def wait(self) -> float:
        assert self.admitted is not None
        return self.admitted - self.arrival.at


@dataclass
class Report:
    """The outcomes, in order of arrival, and what the run cost."""

    outcomes: list[Outcome]
    seconds: float = 0.0
    steps: int = 0
    longest_step: float = 0.0
    loads: int = 0
    tokens: int = 0
    served: list[tuple[float, str, float]] = field(default_factory=list)  # (time, tenant, tokens)

    def share(self, tenant: str, start: float, stop: float) -> float:
        """The tenant's part of the weighted tokens in a time."""
        during = [(who, n) for at, who, n in self.served if start <= at < stop]
        return sum(n for who, n in during if who == tenant) / sum(n for _, n in during)

    def waits(self, *names: str) -> list[float]:
        """Sorted: of the requests that were admitted; with names, of those for these adapters."""
        return sorted(
            o.wait for o in self.outcomes if o.admitted is not None and (not names or {*names} & {*o.arrival.adapters})
        )


class _Engine:
    def __init__(
        self, policy: Policy, choose: Callable[[Snapshot, Policy], Decision], sizes: Mapping[str, int]
    ) -> None:
        self.admission, self.policy, self.sizes = Admission(policy, choose), policy, sizes
        self.resident: dict[str, int] = {}
        self.left: dict[str, int] = {}  # id -> tokens that it will still generate

    def admit(self, now: float, by_id: Mapping[str, Outcome]) -> tuple[int, int, int]:
        """Prompt tokens, bytes and adapters to load for what the policy admits."""
        budget = self.policy.budget
        free = 2**62 if budget is None else budget - sum(self.resident.values())
        decision = self.admission.decide(now, free=free, resident=self.resident, sizes=self.sizes)
        in_use = self.admission.in_batch
        prompt, loaded, loads = 0, 0, 0
        for id in decision.admit:
            outcome = by_id[id]
            assert outcome.admitted is None
            outcome.admitted, arrival = now, outcome.arrival
            prompt += arrival.prompt
            self.left[id] = arrival.ends_after
            for uid in arrival.adapters:
                if uid not in self.resident:
                    self.make_room(self.sizes[uid])
                    loaded, loads = loaded + self.sizes[uid], loads + 1
                self.resident[uid] = self.resident.pop(uid, self.sizes[uid])  # the most recently used one
            self.admission.computed(id, prompt=arrival.prompt)
        for id in decision.expired:
            by_id[id].expired = now
        for id, reason in decision.refused.items():
            by_id[id].refused = reason
        assert len(self.left) <= self.policy.max_running
        assert len(in_use) <= self.policy.max_adapters
        assert budget is None or sum(self.resident.values()) <= budget
        return prompt, loaded, loads

    def make_room(self, size: int) -> None:
        """Evict the least recently used adapters that no request of the batch has."""
        budget, idle = self.policy.budget, [uid for uid in self.resident if uid not in self.admission.in_batch]
        while budget is not None and sum(self.resident.values()) + size > budget:
            assert idle, "an adapter was admitted that has no room beside those in use"
            del self.resident[idle.pop(0)]

    def step(self) -> list[str]:
        """Generate a token for each; the ids that ended."""
        ended = []
        for id in self.left:
            self.left[id] -= 1
            self.admission.computed(id, generated=1)
            if self.left[id] <= 0:
                ended.append(id)
        for id in ended:
            del self.left[id]
            self.admission.remove(id)
        return ended


def simulate(
    arrivals: Iterable[Arrival],
    policy: Policy,
    *,
    sizes: Mapping[str, int] | None = None,
    cost: Cost = Cost(),
    choose: Callable[[Snapshot, Policy], Decision] = decide,
    fair: bool = True,
    stop: float = float("inf"),
) -> Report:
    """Serve a workload to its end, or to a time.

    Args:
        sizes: uid -> bytes; every adapter has 1 byte without.
        choose: the policy.
        fair: whether the policy hears of tenants.
    """
    arrivals = sorted(arrivals)
    sizes = sizes or {uid: 1 for arrival in arrivals for uid in arrival.adapters}
    engine, now = _Engine(policy, choose, sizes), 0.0
    by_id = {f"{i}": Outcome(arrival) for i, arrival in enumerate(arrivals)}
    report, coming = Report(list(by_id.values())), iter(by_id.items())
    upcoming = next(coming, None)
    while now < stop:
        while upcoming is not None and upcoming[1].arrival.at <= now:
            id, arrival = upcoming[0], upcoming[1].arrival
            deadline = None if arrival.deadline is None else arrival.at + arrival.deadline
            tenant, tokens = arrival.tenant if fair else "", arrival.prompt + arrival.generated
            engine.admission.add(Pending(id, arrival.adapters, tenant, arrival.at, deadline, tokens, arrival.prompt))
            upcoming = next(coming, None)
        prompt = loaded = loads = 0
        if engine.admission.due(now):
            prompt, loaded, loads = engine.admit(now, by_id)
        if engine.left:
            took = cost.of(len(engine.left), prompt, len(engine.admission.in_batch), loaded)
            now += took
            report.steps, report.loads = report.steps + 1, report.loads + loads
            report.longest_step = max(report.longest_step, took)
            served: dict[str, float] = {}
            for id, left in engine.left.items():
                arrival = by_id[id].arrival
                new = arrival.prompt if left == arrival.ends_after else 0
                served[arrival.tenant] = served.get(arrival.tenant, 0.0) + policy.weigh(new, 1)
            report.served += [(now, tenant, n) for tenant, n in served.items()]
            report.tokens += len(engine.left)
            for id in engine.step():
                by_id[id].ended = now
        elif upcoming is not None:
            now = upcoming[1].arrival.at
        else:
            assert not engine.admission.waiting, "an idle engine never admits these"
            break
    report.seconds = now
    return report


def fifo(snapshot: Snapshot, policy: Policy) -> Decision:
    """The plain policy: in order of arrival; the first that does not fit stops all behind it."""
    in_batch = {uid for request in snapshot.running for uid in request.adapters}
    room = snapshot.free + sum(size for uid, size in snapshot.resident.items() if uid not in in_batch)
    admit = list[str]()
    for request in snapshot.waiting:
        new = [uid for uid in request.adapters if uid not in in_batch]
        full = len(snapshot.running) + len(admit) >= policy.max_running
        need = sum(snapshot.sizes[uid] for uid in new)
        if full or len(in_batch) + len(new) > policy.max_adapters or need > room:
            break
        room -= need
        in_batch.update(new)
        admit.append(request.id)
    return Decision(tuple(admit))


def poisson(random: Random, rate: float, seconds: float, cv: float = 1.0) -> list[float]:
    """Times of arrivals: Gamma intervals, which for cv = 1 is a Poisson process."""
    times, now = [], 0.0
    while (now := now + random.gammavariate(1 / cv**2, cv**2 / rate)) < seconds:
        times.append(now)
    return times


def zipf(random: Random, n: int, exponent: float = 1.0) -> Callable[[], str]:
    """A draw of adapters by popularity: the k-th with weight k^-exponent; uniform for 0."""
    names, weights = [f"a{i}" for i in range(n)], [(i + 1) ** -exponent for i in range(n)]
    drawn = iter(random.choices(names, weights, k=100_000))
    return lambda: next(drawn)


def merged(*workloads: list[Arrival]) -> list[Arrival]:
    return list(heapq.merge(*workloads))
