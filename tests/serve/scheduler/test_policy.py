"""The scheduling policy by simulation, at 10,000 adapters: nobody starves, shares are fair, limits hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from lorary.errors import ConfigError, StateError
from lorary.serve.interface import RequestError
from lorary.serve.scheduler.admission import Admission
from lorary.serve.scheduler.decide import decide
from lorary.serve.scheduler.pending import Pending, Waiting
from lorary.serve.scheduler.policy import Decision, Policy, Snapshot, why_never
from tests.serve import simulator
from tests.serve.simulator import Arrival, Cost, simulate

POLICY = Policy(max_running=32, max_adapters=16)
NO_AGEING = dataclasses.replace(POLICY, patience=1e9)


def workload(
    seed: int, rate: float, seconds: float, draw: Callable[[Random], Callable[[], str]], **options: Any
) -> list[Arrival]:
    """Requests at random times, of random lengths, each with an adapter that is drawn."""
    random = Random(seed)
    adapter, cv = draw(random), options.pop("cv", 1.0)
    found = []
    for at in simulator.poisson(random, rate, seconds, cv):
        length = random.randint(8, 64)
        found.append(
            Arrival(at, (adapter(),), prompt=random.randint(8, 128), generated=length, ends_after=length, **options)
        )
    return found


def flood(rate: float, seconds: float, n: int, tenant: str = "", length: int = 32) -> list[Arrival]:
    """Requests at a steady rate, for n adapters in turn."""
    return [
        Arrival(i / rate, (f"hot{i % n}",), tenant, generated=length, ends_after=length)
        for i in range(int(rate * seconds))
    ]


@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_ten_thousand_adapters(exponent: float, cv: float) -> None:
    """All are served, and with a budget for few adapters, no slower than in order of arrival."""
    requests = workload(0, 20, 60, lambda random: simulator.zipf(random, 10_000, exponent), cv=cv)
    sizes = {f"a{i}": 10_000_000 * (1 + i % 4) for i in range(10_000)}
    policy = dataclasses.replace(POLICY, budget=500_000_000)
    ours = simulate(requests, policy, sizes=sizes)
    plain = simulate(requests, policy, sizes=sizes, choose=simulator.fifo)
    assert all(outcome.ended for outcome in ours.outcomes)
    assert ours.tokens == plain.tokens
    assert ours.seconds <= plain.seconds * 1.02
    assert ours.loads <= plain.loads * 1.02


def test_scarce_adapter_slots_are_used_better_than_in_order_of_arrival() -> None:
    """Clustering: more than FIFO's throughput where a batch takes four of a thousand adapters."""
    requests = workload(1, 60, 20, lambda random: simulator.zipf(random, 1_000, 1.2))
    policy = Policy(max_running=32, max_adapters=4)
    ours, plain = simulate(requests, policy), simulate(requests, policy, choose=simulator.fifo)
    assert all(outcome.ended for outcome in ours.outcomes)
    assert ours.seconds < 0.8 * plain.seconds


COLD = [Arrival(5.0, ("cold",)), Arrival(20.0, ("colder",)), Arrival(25.0, ("hot1", "hot2", "mixed"))]


def longest(report: simulator.Report, requests: list[Arrival]) -> float:
    """L: the longest time that a request can run."""
    return max(r.generated for r in requests) * report.longest_step


def late(report: simulator.Report, policy: Policy) -> list[str]:
    """The requests of one tenant that waited for longer than the policy promises.

    In turn is who has no older one before it; from then on it may take `patience` until it has waited long enough,
    `patience` until an adapter may be closed, L for the adapter and L for memory, and a step of the clock for each.
    """
    bound = policy.patience + 2 * longest(report, [o.arrival for o in report.outcomes]) + 4 * report.longest_step
    found, in_turn = [], 0.0
    for i, outcome in enumerate(report.outcomes):
        begun = min(t for t in (outcome.admitted, outcome.expired, report.seconds) if t is not None)
        if not outcome.refused and begun > max(in_turn, outcome.arrival.at + policy.patience) + bound:
            found.append(f"request {i} for {outcome.arrival.adapters} waited {begun - outcome.arrival.at:.1f} s")
        in_turn = max(in_turn, begun)
    return found


def test_nobody_starves_beside_hot_adapters() -> None:
    """Hot adapters hold every slot for as long as anybody asks for them; a request of three adapters needs a third."""
    policy = dataclasses.replace(POLICY, max_adapters=4)
    requests = simulator.merged(flood(40, 60, 4), COLD)
    report = simulate(requests, policy, stop=60)
    assert late(report, policy) == []
    assert report.waits("cold")[0] < 5
    assert report.waits("mixed")[0] < 8


def test_without_ageing_they_starve() -> None:
    policy = dataclasses.replace(NO_AGEING, max_adapters=4)
    report = simulate(simulator.merged(flood(40, 60, 4), COLD), policy, stop=60)
    assert report.waits("cold", "colder", "mixed") == []
    assert late(report, POLICY)


def test_closing_one_adapter_costs_little() -> None:
    """A cold request every second beside four hot adapters: most of the throughput stays."""
    policy = dataclasses.replace(POLICY, max_adapters=4)
    cold = [Arrival(float(i), (f"cold{i}",)) for i in range(1, 60)]
    alone = simulate(flood(100, 60, 4), policy, stop=60)
    report = simulate(simulator.merged(flood(100, 60, 4), cold), policy, stop=60)
    assert report.tokens > 0.75 * alone.tokens
    assert late(report, policy) == []


def test_an_overloaded_engine_still_clusters() -> None:
    """Two adapters in turn for one slot, far more than it can serve: each keeps the slot for `patience`."""
    policy = Policy(max_running=16, max_adapters=1, patience=2.0)
    report = simulate(flood(200, 30, 2), policy, stop=60)
    alone = simulate(flood(200, 30, 1), policy, stop=60)
    assert report.tokens > 0.6 * alone.tokens
    assert late(report, policy) == []


def test_a_large_adapter_gets_its_memory() -> None:
    """Eight small adapters fill the memory for as long as anybody asks for them."""
    policy = Policy(max_running=64, budget=800, patience=2.0)
    cost, sizes = dataclasses.replace(Cost(), step=0.05), {"big": 700} | {f"hot{i}": 100 for i in range(8)}
    requests = simulator.merged(flood(100, 30, 8, length=8), [Arrival(1.0, ("big",), generated=16, ends_after=16)])
    report = simulate(requests, policy, cost=cost, sizes=sizes)
    assert late(report, policy) == []
    assert report.waits("big")[0] < 5
    starved = simulate(requests, dataclasses.replace(policy, patience=1e9), cost=cost, sizes=sizes, stop=30)
    assert starved.waits("big") == []


TENANTS = ("one", "two", "flood")


def rivals(seconds: float = 60) -> list[Arrival]:
    """Three tenants with more work than there is room for, one of them with ten times the requests."""
    quiet = [flood(30, seconds, 4, tenant) for tenant in ("one", "two")]
    return simulator.merged(*quiet, flood(300, seconds, 4, "flood", length=48))


def test_tenants_with_enough_work_get_equal_shares() -> None:
    report = simulate(rivals(), POLICY, stop=60)
    for tenant in TENANTS:
        assert report.share(tenant, 10, 60) == pytest.approx(1 / 3, rel=0.05)


def test_without_counters_the_flood_takes_most() -> None:
    report = simulate(rivals(), POLICY, stop=60, fair=False)
    assert report.share("flood", 10, 60) > 0.7


def test_a_light_tenant_does_not_feel_the_flood() -> None:
    """Its few requests begin within a second though thousands wait before them."""
    light = [Arrival(i + 0.5, ("light",), "light") for i in range(1, 59)]
    policy = dataclasses.replace(POLICY, patience=1.0)
    requests = simulator.merged(flood(300, 60, 4, "flood"), light)
    assert simulate(requests, policy, stop=60).waits("light")[-1] < 1.0
    assert simulate(requests, policy, stop=60, fair=False).waits("light")[-1] > 10


def test_idleness_earns_no_credit() -> None:
    """A tenant that comes back after 40 s does not shut the others out."""
    back = [arrival._replace(at=arrival.at + 40) for arrival in flood(300, 20, 4, "back")]
    report = simulate(simulator.merged(rivals(60), back), POLICY, stop=60)
    for tenant in (*TENANTS, "back"):
        assert report.share(tenant, 43, 60) == pytest.approx(1 / 4, rel=0.1)


def test_shares_hold_under_scarce_adapter_slots() -> None:
    """A tenant whose requests all have adapters of their own, beside one that keeps four adapters hot."""
    many = [Arrival(i / 100, (f"own{i}",), "many") for i in range(6000)]
    policy = dataclasses.replace(POLICY, max_adapters=12)
    report = simulate(simulator.merged(flood(100, 60, 4, "hot"), many), policy, stop=60)
    assert report.share("many", 20, 60) == pytest.approx(0.5, rel=0.1)


def test_deadlines() -> None:
    """Under three times the load, whatever begins does so in time, and the rest is refused at once."""
    requests = workload(3, 100, 60, lambda random: simulator.zipf(random, 10_000), deadline=3.0)
    report = simulate(requests, POLICY)
    began = [o for o in report.outcomes if o.admitted is not None]
    for outcome in report.outcomes:
        assert (outcome.admitted is None) != (outcome.expired is None)
        if outcome.expired is not None:
            assert 3.0 <= outcome.expired - outcome.arrival.at < 3.0 + 2 * report.longest_step
    assert all(o.wait < 3.0 for o in began)
    late_too = simulate([r._replace(deadline=None) for r in requests], POLICY)
    in_time = sum(o.wait < 3.0 for o in late_too.outcomes)
    assert len(began) > 3 * in_time  # nobody computes what is too late


def test_a_request_that_can_never_fit_is_refused() -> None:
    policy = Policy(max_adapters=2, budget=1000)
    sizes = {"a": 400, "b": 601, "c": 600}
    requests = [Arrival(0, ("a", "b")), Arrival(0, ("a", "b", "c")), Arrival(0, ("a", "c"))]
    first, second, third = (o for o in simulate(requests, policy, sizes=sizes).outcomes)
    outcomes = {o.arrival: o.refused for o in (first, second, third)}
    assert outcomes[requests[0]] == "its adapters need 1,001 bytes, and the budget is 1,000"
    assert outcomes[requests[1]] == (
        "it has 3 adapters, and a batch takes 2; its adapters need 1,601 bytes, and the budget is 1,000"
    )
    assert outcomes[requests[2]] == ""
    assert why_never(Pending("x", ("a",)), policy, 501, 500) == (
        "its adapters need 501 bytes, and the budget is 1,000 beside 500 of pinned adapters"
    )
    assert why_never(Pending("x", ("a",)), policy, 500, 500) == ""


def test_idle_adapters_give_way_and_those_in_use_and_pinned_ones_do_not() -> None:
    resident = {"waited": 10, "pinned": 10, "old": 10, "used": 10, "new": 10}
    snapshot = Snapshot(
        0.0,
        Waiting([Pending("r", ("cold",)), Pending("s", ("colder",)), Pending("t", ("x",))]),
        [Pending("q", ("used",))],
        resident,
        {"cold": 15, "colder": 15, "x": 1},
        pinned=frozenset({"pinned"}),
    )
    assert decide(snapshot, Policy(max_adapters=4, patience=5)) == Decision(("r", "s"), until=5.0)
    assert decide(dataclasses.replace(snapshot, free=1), Policy(max_adapters=4)).admit == ("r", "s", "t")


def test_a_request_that_joins_its_adapter_does_not_keep_it_open() -> None:
    waiting = Waiting([Pending(id, (uid,), arrived=0.0) for id, uid in (("a", "hot"), ("b", "cold"), ("c", "hot"))])
    snapshot = Snapshot(10.0, waiting, [Pending("r", ("hot",))], {"hot": 1}, {"cold": 1}, free=1, since={"hot": 0.0})
    policy = Policy(max_adapters=1, patience=5)
    assert decide(snapshot, policy).admit == ("a",)
    assert decide(dataclasses.replace(snapshot, since={"hot": 6.0}), policy).admit == ("a", "c")


def test_a_pinned_adapter_that_is_not_resident_needs_room() -> None:
    waiting, pinned = Waiting([Pending("a", ("x",), arrived=0.0)]), frozenset({"x"})
    snapshot = Snapshot(0.0, waiting, resident={"old": 6}, sizes={"x": 5}, free=0, pinned=pinned)
    assert decide(snapshot, POLICY) == Decision(("a",))
    assert decide(dataclasses.replace(snapshot, resident={"x": 5}), POLICY) == Decision(("a",))
    assert decide(dataclasses.replace(snapshot, resident={}), POLICY).admit == ()


def test_nothing_is_asked_again_while_nothing_changes() -> None:
    admission = Admission(Policy(max_running=1, patience=2.0))
    assert not admission.due(0.0)
    for id, deadline in (("a", None), ("b", 1.0), ("c", None)):
        admission.add(Pending(id, arrived=0.0, deadline=deadline, tokens=4))
    assert admission.decide(0.0).admit == ("a",)
    admission.computed("a", prompt=0, generated=1)
    assert not admission.due(0.5)
    assert admission.due(1.0)
    assert admission.decide(1.0) == Decision(expired=("b",))
    assert not admission.due(1e9)
    admission.remove("a")
    assert admission.decide(1e9).admit == ("c",)
    admission.remove("c")
    admission.remove("c")
    assert admission.shares.served == {"": 2.0}


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: Policy(max_running=0), ConfigError, "max_running: is 0, and must be a number from 1"),
        (lambda: Policy(max_adapters=-1), ConfigError, "max_adapters: is -1, and must be a number from 1"),
        (lambda: Policy(patience=math.nan), ConfigError, "patience: is nan, and must be a number from 0"),
        (lambda: Policy(patience=math.inf), ConfigError, "patience: is inf, and must be a number from 0"),
        (lambda: Policy(budget=0), ConfigError, "budget: is 0, and must be a number from 1"),
        (lambda: Policy(input_weight=-2), ConfigError, "input_weight: is -2, and must be a number from 0"),
        (
            lambda: Policy(input_weight=0, output_weight=0),
            ConfigError,
            "input_weight, output_weight: are both 0: every tenant's counter would stay there",
        ),
        (lambda: Pending("a", tokens=-1), RequestError, "tokens: is -1, and must not be negative"),
        (lambda: Pending("a", tokens=1, prompt=2), RequestError, "prompt: is 2, and must be from 0 to tokens, 1"),
        (lambda: Pending("a", ("y", "x")), RequestError, "adapters: are ['y', 'x'], and must be sorted, each once"),
        (lambda: Pending("a", ("x", "x")), RequestError, "adapters: are ['x', 'x'], and must be sorted, each once"),
        (lambda: Pending("a", deadline=math.nan), RequestError, "deadline: is not a number"),
        (
            lambda: decide(Snapshot(0, Waiting([Pending("a", ("x",))])), POLICY),
            StateError,
            "x: is waited for, and its size is not given",
        ),
    ],
)
def test_bad_input(make: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value).splitlines()[1:] == [f"  - {sentence}"]


def test_what_could_not_begin_waits_in_its_old_place() -> None:
    admission = Admission(Policy(max_running=2))
    for id in "abcd":
        admission.add(Pending(id, ("x",) if id == "c" else (), arrived=0.0))
    assert admission.decide(0.0, sizes={"x": 1}, free=1).admit == ("a", "b")
    for id in "ab":
        admission.remove(id)
    assert admission.decide(1.0, sizes={"x": 1}, free=1).admit == ("c", "d")
    admission.put_back(["c", "d"], 1.5)
    assert [request.id for request in admission.waiting] == ["c", "d"]
    assert (admission.running, dict(admission.in_batch)) == ((), {})
    assert not admission.due(1.4)
    admission.add(Pending("e", arrived=1.4))
    assert [request.id for request in admission.waiting] == ["c", "d", "e"]
    assert admission.due(1.5)
    assert admission.decide(1.5, sizes={"x": 1}, free=1).admit == ("c", "d")


def test_an_id_is_queued_once() -> None:
    admission = Admission(POLICY)
    admission.add(Pending("a"))
    with pytest.raises(StateError, match="a: the id is taken"):
        admission.add(Pending("a"))
