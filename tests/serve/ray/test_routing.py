"""Consistent hashing with bounded loads: few replicas for an adapter, no hot spots, few moves when one leaves."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from lorary.serve.ray.routing import ranked_replicas


def idle(*replicas: str) -> dict[str, int]:
    return dict.fromkeys(replicas, 0)


def test_an_adapter_goes_to_the_same_replica_while_they_are_equally_busy() -> None:
    for adapter in map(str, range(50)):
        first = ranked_replicas(adapter, idle("a", "b", "c"))
        assert sorted(first) == ["a", "b", "c"]
        assert ranked_replicas(adapter, {"c": 7, "b": 7, "a": 7}) == first


def test_adapters_are_spread() -> None:
    shares = Counter(ranked_replicas(f"adapter-{i}", idle("a", "b", "c", "d"))[0] for i in range(2000))
    assert len(shares) == 4
    assert min(shares.values()) > 400


def test_a_replica_that_leaves_moves_its_own_adapters_alone() -> None:
    names = [f"adapter-{i}" for i in range(500)]
    before = {name: ranked_replicas(name, idle("a", "b", "c", "d"))[0] for name in names}
    after = {name: ranked_replicas(name, idle("a", "b", "d"))[0] for name in names}
    assert all(after[name] == before[name] for name in names if before[name] != "c")


def test_a_busy_replica_is_passed_over_and_still_the_last_resort() -> None:
    home, second, *_ = ranked_replicas("x", idle("a", "b", "c"))
    assert ranked_replicas("x", idle("a", "b", "c") | {home: 9})[0] == second
    assert ranked_replicas("x", idle("a", "b", "c") | {home: 9})[-1] == home
    assert ranked_replicas("x", {"a": 9, "b": 9, "c": 9} | {home: 11})[0] == home  # within the bound


def test_the_base_goes_to_the_least_busy() -> None:
    assert ranked_replicas("", {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    assert ranked_replicas("x", {}) == []


@pytest.mark.parametrize("skew", [0.0, 1.2], ids=["uniform", "Zipf"])
def test_loads_stay_within_the_bound_and_adapters_on_few_replicas(skew: float) -> None:
    """5,000 requests to 200 adapters, 60 in flight: no replica above 1.25 times the mean and two."""
    draw = random.Random(0)
    weights = [1 / (i + 1) ** skew for i in range(200)]
    loads, homes, flying = idle(*"abcdefgh"), defaultdict[str, set[str]](set), list[str]()
    for adapter in draw.choices([str(i) for i in range(200)], weights, k=5000):
        replica = ranked_replicas(adapter, loads)[0]
        loads[replica] += 1
        homes[adapter].add(replica)
        flying.append(replica)
        assert loads[replica] <= 1.25 * sum(loads.values()) / len(loads) + 3
        if len(flying) > 60:
            loads[flying.pop(draw.randrange(len(flying)))] -= 1
    rare = [len(homes[str(i)]) for i in range(20, 200) if homes[str(i)]]
    assert sum(rare) / len(rare) < 4  # of 8: where each request goes to the least busy one, it is nearly all
