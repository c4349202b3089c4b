"""Properties of the scheduling policy and of its parts, over random snapshots and workloads."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorary.serve.scheduler.decide import decide
from lorary.serve.scheduler.pending import Pending, Waiting
from lorary.serve.scheduler.policy import Decision, Policy, Snapshot
from lorary.serve.scheduler.shares import Shares
from tests.serve.scheduler.test_policy import late
from tests.serve.simulator import Arrival, Cost, simulate

NOW = 10.0
quick = settings(
    derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
adapter_sets = st.sets(st.sampled_from("abcde"), max_size=2).map(lambda names: tuple(sorted(names)))
policies = st.builds(
    Policy,
    max_running=st.integers(1, 6),
    max_adapters=st.integers(1, 4),
    patience=st.sampled_from([0.0, 3.0, 100.0]),
)


def requests(prefix: str, most: int, tenants: str) -> st.SearchStrategy[list[Pending]]:
    one = st.builds(
        Pending,
        id=st.just(""),
        adapters=adapter_sets,
        tenant=st.sampled_from(tenants),
        arrived=st.integers(0, int(NOW)).map(float),
        deadline=st.one_of(st.none(), st.none(), st.integers(5, 15).map(float)),
        tokens=st.integers(1, 20),
    )
    return st.lists(one, max_size=most).map(
        lambda found: [
            dataclasses.replace(request, id=f"{prefix}{i}")
            for i, request in enumerate(sorted(found, key=lambda request: request.arrived))
        ]
    )


@st.composite
def situations(draw: Any, tenants: str = "xyz") -> tuple[Snapshot, Policy]:
    """A snapshot that an engine can come to, and a policy."""
    policy = draw(policies)
    waiting, running, in_batch = draw(requests("w", 12, tenants)), list[Pending](), set[str]()
    for request in draw(requests("r", policy.max_running, tenants)):
        if len(in_batch.union(request.adapters)) <= policy.max_adapters:
            in_batch.update(request.adapters)
            running.append(dataclasses.replace(request, deadline=None))
    sizes = {uid: draw(st.integers(1, 20)) for uid in "abcde"}
    others = draw(st.permutations(sorted(set("abcde") - in_batch)))[: draw(st.integers(0, 3))]
    resident = {uid: sizes[uid] for uid in [*others, *sorted(in_batch)]}
    pinned = frozenset(draw(st.sets(st.sampled_from(others), max_size=1))) if others else frozenset[str]()
    free = draw(st.integers(1, 40))
    policy = dataclasses.replace(policy, budget=sum(resident.values()) + free)
    since = {uid: draw(st.integers(0, int(NOW))) for uid in draw(st.sets(st.sampled_from("abcde"))) & in_batch}
    served = {tenant: float(draw(st.integers(0, 50))) for tenant in tenants}
    return Snapshot(NOW, Waiting(waiting), running, resident, sizes, free, served, since, pinned), policy


def reference(snapshot: Snapshot, policy: Policy) -> Decision:
    """The same decision by looking at every request, one by one; without `until`."""
    running, admitted, refused = list(snapshot.running), list[Pending](), dict[str, str]()
    expired = [r for r in snapshot.waiting if r.deadline is not None and r.deadline <= snapshot.now]
    queues: dict[str, list[Pending]] = {}
    first: dict[str, float] = {}
    for request in snapshot.waiting:
        first.setdefault(request.tenant, request.arrived)
        if request not in expired:
            queues.setdefault(request.tenant, []).append(request)
    closing, reserved = set[str](), False

    def counter(tenant: str) -> float:
        own = [r for r in running if r.tenant == tenant]
        return snapshot.served.get(tenant, 0.0) + sum(policy.weigh(r.prompt, r.tokens - r.prompt) for r in own)

    def need(batch: list[Pending]) -> int:
        """Bytes that a batch takes, pinned adapters included."""
        uids = {uid for r in batch for uid in r.adapters} | snapshot.pinned
        return sum(snapshot.sizes[uid] for uid in uids)

    assert policy.budget is not None
    while any(queues.values()) and len(running) < policy.max_running:
        tenant = min((t for t in queues if queues[t]), key=lambda t: (counter(t), first[t], t))
        request = queues[tenant].pop(0)
        live = {uid for r in running for uid in r.adapters}
        new = {*request.adapters} - live
        slots = len(live) + len(new) <= policy.max_adapters and not (new and reserved)
        if slots and not closing & {*request.adapters} and need([*running, request]) <= policy.budget:
            running.append(request)
            admitted.append(request)
        elif len(request.adapters) > policy.max_adapters or need([request]) > policy.budget:
            refused[request.id] = ""
        elif request.arrived + policy.patience <= snapshot.now:
            if slots and not closing & {*request.adapters}:
                break
            if not reserved:
                reserved = True
                mine = {uid for r in admitted for uid in r.adapters if uid not in _uids(snapshot.running)}
                since = {uid: snapshot.now if uid in mine else snapshot.since.get(uid, -1e9) for uid in live}
                left = {uid: max(r.tokens for r in running if uid in r.adapters) for uid in live}
                old = [u for u in live - {*request.adapters} if since[u] + policy.patience <= snapshot.now]
                lacks = len(live) + len(new) - policy.max_adapters
                closing = set(sorted(old, key=lambda uid: (left[uid], uid))[:lacks])
    return Decision(tuple(r.id for r in admitted), tuple(r.id for r in expired), refused)


def _uids(batch: Any) -> set[str]:
    return {uid for request in batch for uid in request.adapters}


@quick
@given(situations())
def test_the_index_changes_no_decision(situation: tuple[Snapshot, Policy]) -> None:
    snapshot, policy = situation
    ours, plain = decide(snapshot, policy), reference(snapshot, policy)
    assert ours.admit == plain.admit
    assert sorted(ours.expired) == sorted(plain.expired)
    assert {*ours.refused} <= {*plain.refused}  # those that the index passes are refused when it is their turn
    assert decide(snapshot, policy) == ours


@quick
@given(situations())
def test_limits_hold(situation: tuple[Snapshot, Policy]) -> None:
    snapshot, policy = situation
    decision = decide(snapshot, policy)
    by_id = {request.id: request for request in snapshot.waiting}
    taken = [by_id[id] for id in decision.admit]
    after = [*snapshot.running, *taken]
    assert len({*decision.admit, *decision.expired, *decision.refused}) == sum(
        map(len, (decision.admit, decision.expired, decision.refused))
    )
    assert len(after) <= max(policy.max_running, len(snapshot.running))
    assert len(_uids(after)) <= policy.max_adapters
    assert all(r.deadline is None or r.deadline > snapshot.now for r in taken)
    assert policy.budget is not None
    staying = _uids(after) | (snapshot.pinned & {*snapshot.resident})
    assert sum(snapshot.sizes[uid] for uid in staying) <= policy.budget


@quick
@given(situations(tenants="x"))
def test_a_decision_that_was_carried_out_stands_until_it_says(situation: tuple[Snapshot, Policy]) -> None:
    snapshot, policy = situation
    decision = decide(snapshot, policy)
    by_id = {request.id: request for request in snapshot.waiting}
    taken = [by_id[id] for id in decision.admit]
    running = [*snapshot.running, *taken]
    staying = _uids(running) | snapshot.pinned  # everything idle was evicted
    resident, free = {uid: snapshot.sizes[uid] for uid in staying}, snapshot.free
    free += sum(snapshot.resident.values()) - sum(resident.values())
    gone = {*decision.admit, *decision.expired, *decision.refused}
    after = dataclasses.replace(
        snapshot,
        waiting=Waiting(r for r in snapshot.waiting if r.id not in gone),
        running=running,
        resident=resident,
        free=free,
        since={**dict.fromkeys(_uids(taken) - _uids(snapshot.running), NOW), **snapshot.since},
    )
    for now in (NOW, min(decision.until, 1e9) - 0.5):
        if now >= NOW:
            again = decide(dataclasses.replace(after, now=now), policy)
            assert (again.admit, again.expired) == ((), ())


workloads = st.lists(
    st.builds(
        lambda at, adapters, length: Arrival(at / 10, adapters, "", 4, length, length),
        st.integers(0, 100),
        adapter_sets,
        st.integers(1, 24),
    ),
    min_size=1,
    max_size=40,
)


@settings(quick, max_examples=60)
@given(workloads, policies, st.integers(60, 200))
def test_everybody_is_admitted_within_the_bound(work: list[Arrival], policy: Policy, budget: int) -> None:
    policy = dataclasses.replace(policy, patience=min(policy.patience, 3.0), budget=budget)
    report = simulate(work, policy, sizes=dict(zip("abcde", (5, 9, 20, 1, 7), strict=True)), cost=Cost(step=0.1))
    assert late(report, policy) == []
    assert all(outcome.ended is not None or outcome.refused for outcome in report.outcomes)


@settings(quick, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("xyz"), st.integers(0, 30)), max_size=60))
def test_counters(events: list[tuple[bool, str, int]]) -> None:
    """A tenant that begins is not below an active one, whatever it has had stays counted, and no counter falls."""
    shares, active, most = Shares(Policy()), Counter[str](), dict[str, float]()
    for comes, tenant, tokens in events:
        others = [shares.served[t] for t in active if active[t] and t != tenant]
        if comes:
            new = not active[tenant]
            shares.enter(tenant)
            active[tenant] += 1
            assert not (new and others) or shares.served[tenant] >= min(others)
        elif active[tenant]:
            shares.charge(tenant, generated=tokens)
            shares.leave(tenant)
            active[tenant] -= 1
        if active[tenant]:
            assert shares.served[tenant] >= most.get(tenant, 0.0)
            most[tenant] = shares.served[tenant]


@settings(quick, max_examples=60)
@given(requests("w", 20, "xyz"), st.lists(st.integers(0, 19), max_size=20))
def test_the_index_is_of_what_waits(found: list[Pending], out: list[int]) -> None:
    waiting, plain = Waiting(), list[Pending]()
    for request in found:
        waiting.add(request)
        plain.append(request)
    for i in out:
        assert waiting.pop(f"w{i}") == next((r for r in plain if r.id == f"w{i}"), None)
        plain = [r for r in plain if r.id != f"w{i}"]
    assert list(waiting) == plain
    assert len(waiting) == len(plain)
    assert waiting.wanted == Counter(uid for r in plain for uid in r.adapters)
    late_ones = [(r.deadline, r.id) for r in plain if r.deadline is not None and r.deadline <= NOW]
    assert waiting.expired(NOW) == tuple(id for _, id in sorted(late_ones))
    later = [r.deadline for r in plain if r.deadline is not None and r.deadline > NOW]
    assert waiting.next_deadline(NOW) == min(later, default=float("inf"))
    assert {*waiting.tenants} == {r.tenant for r in plain}
    for tenant in waiting.tenants:
        own = [r for r in plain if r.tenant == tenant]
        assert [r for _, r in waiting.in_order(tenant)] == own
        within = [r.id for _, group in waiting.groups_within(tenant, "ab") for _, r in group]
        assert sorted(within) == sorted(r.id for r in own if {*r.adapters} <= {*"ab"})
    for request in plain:
        waiting.pop(request.id)
    assert not waiting
    assert waiting.tenants == {}
