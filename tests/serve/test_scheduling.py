"""The engine follows its scheduling policy: it clusters, ages, and shares between tenants."""

from __future__ import annotations

from typing import Any

import pytest

import lorary
from lorary.serve.open import engine_of
from lorary.serve.request import Finished, Request, Sampling
from lorary.serve.scheduler.policy import Policy
from tests import tiny

from .running import saved_adapter, words

SIZES: dict[str, Any] = {"vocab_size": 32, "max_position_embeddings": 128, "eos_token_id": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    method = lorary.method("lora", r=2, alpha=4)
    return {
        name: saved_adapter(tiny.seeded("LlamaForCausalLM", **SIZES), method, root / name, size=0.1 + i / 10)
        for i, name in enumerate("ab")
    }


def beginnings(folders: dict[str, str], policy: Policy, requests: list[Request]) -> tuple[list[str], dict[str, str]]:
    """The ids in the order of their first tokens, and how each ended; all wait before the engine starts."""
    model = tiny.seeded("LlamaForCausalLM", **SIZES)
    engine = engine_of(model, words(32), "base", budget=2**22, policy=policy)
    for name, folder in folders.items():
        engine.load(name, folder)
    begun, ended = list[str](), dict[str, str]()
    for request in requests:

        def deliver(event: object, id: str = request.id) -> None:
            if isinstance(event, Finished):
                ended[id] = f"{event.reason}: {event.error}" if event.error else event.reason
            elif id not in begun:
                begun.append(id)

        engine.submit(request, deliver)
    engine.start()
    engine.stop(drain=60)
    return begun, ended


def request(id: str, adapter: str, *, tokens: int = 4, tenant: str = "") -> Request:
    sampling = Sampling(max_tokens=tokens, temperature=0.0)
    return Request((1, 2, 3), {adapter: 1.0}, sampling, tenant, id=id)


def test_requests_of_one_adapter_run_together(folders: dict[str, str]) -> None:
    requests = [request(f"{name}{i}", name, tokens=4 + 4 * i) for i in range(3) for name in "ab"]
    policy = Policy(max_running=2, max_adapters=1, patience=1000)
    begun, ended = beginnings(folders, policy, requests)
    assert [id[0] for id in begun] == ["a", "a", "a", "b", "b", "b"]
    assert set(ended.values()) == {"length"}
    begun, _ = beginnings(folders, Policy(max_running=2, max_adapters=1, patience=0), requests)
    assert [id[0] for id in begun] == ["a", "b", "a", "b", "a", "b"]  # nobody may be passed over


def test_a_tenant_s_flood_does_not_hold_up_another(folders: dict[str, str]) -> None:
    flood = [request(f"flood{i}", "a", tenant="flood") for i in range(10)]
    light = [request(f"light{i}", "b", tenant="light") for i in range(2)]
    begun, ended = beginnings(folders, Policy(max_running=2), [*flood, *light])
    assert {*begun[:4]} == {"flood0", "flood1", "light0", "light1"}
    assert set(ended.values()) == {"length"}
    same = [request(r.id, *r.adapters) for r in (*flood, *light)]
    assert beginnings(folders, Policy(max_running=2), same)[0] == [r.id for r in same]
