"""The metrics: every figure against what really happened, read by Prometheus' own parser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from lorary import builtin
from lorary.errors import Diagnostic
from lorary.serve.http.app import create_app
from lorary.serve.http.metrics import adapters_that_fit, metrics_router
from lorary.serve.http.observed import Observed
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard, BusyError, Engine, Statistics
from lorary.serve.request import Event, Finished, Request, Token
from tests.serve.http.scripted import Scripted


def scrape(observed: Observed, accept: str = "") -> dict[str, float]:
    """`name{label=value,...}` -> value, from what the route answers."""
    app = FastAPI()
    app.include_router(metrics_router(observed.metrics))
    answer = TestClient(app).get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def parsed(text: str) -> dict[str, float]:
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def run(engine: Scripted, observed: Observed, request: Request, *events: Event) -> None:
    observed.submit(request, lambda event: None)
    for event in events:
        engine.delivers[request.id](event)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_requests_are_counted_and_timed(accept: str) -> None:
    engine = Scripted()
    observed, heard = Observed(engine), list[Event]()
    request = Request((1, 2, 3))
    observed.submit(request, heard.append)
    events = [Token(5, "x"), Token(6, "y"), Finished("stop", "", 3, 0, 3)]  # the third is an end-of-sequence token
    for event in events:
        time.sleep(0.01)
        engine.delivers[request.id](event)
    assert heard == events
    run(engine, observed, Request((1,)), Finished("cancelled", "", 1, 0, 0))
    found = scrape(observed, accept)
    assert found["vllm:prompt_tokens_total{model_name=base}"] == 4
    assert found["vllm:generation_tokens_total{model_name=base}"] == 3 == observed.tokens
    assert found["vllm:request_success_total{finished_reason=stop,model_name=base}"] == 1
    assert found["vllm:request_success_total{finished_reason=abort,model_name=base}"] == 1
    assert found["vllm:time_to_first_token_seconds_count{model_name=base}"] == 1 == len(observed.first_tokens)
    assert found["vllm:time_to_first_token_seconds_sum{model_name=base}"] >= 0.01
    assert found["vllm:inter_token_latency_seconds_count{model_name=base}"] == 1
    assert found["vllm:e2e_request_latency_seconds_count{model_name=base}"] == 2
    assert found["vllm:e2e_request_latency_seconds_sum{model_name=base}"] >= 0.03
    assert found["vllm:num_requests_running{model_name=base}"] == 0
    assert found["vllm:num_requests_waiting{model_name=base}"] == 0
    assert found["vllm:kv_cache_usage_perc{model_name=base}"] == 0  # pickers refuse a server without it


def test_the_gauge_of_adapters_is_the_endpoint_picker_s() -> None:
    engine = Scripted(budget_bytes=1000, running=3, waiting=2)
    observed = Observed(engine)
    before = time.time()
    run(engine, observed, Request((1,), {"b": 0.5, "a": 0.5}), Token(5, "x"))
    run(engine, observed, Request((1,), {"a": 1.0}))  # waits, but another of its adapter runs
    run(engine, observed, Request((1,), {"d": 1.0}))
    run(engine, observed, Request((1,), {"c": 1.0}))
    found = scrape(observed)
    (gauge,) = (key for key in found if key.startswith("vllm:lora_requests_info"))  # one series: the newest by nature
    assert gauge == "vllm:lora_requests_info{max_lora=3,running_lora_adapters=a,b,waiting_lora_adapters=c,d}"
    assert before <= found[gauge] <= time.time()
    assert found["vllm:num_requests_running{model_name=base}"] == 3  # the engine's own count, where it has one
    assert found["vllm:num_requests_waiting{model_name=base}"] == 2


def test_the_figures_of_the_engine() -> None:
    figures = {"kv_usage": 0.25, "budget_bytes": 1000, "adapter_bytes": 300, "kv_bytes": 200, "host_bytes": 50}
    counts = {"prefix_queries": 40, "prefix_hits": 10, "hits": 7, "evictions": 2, "loads": 4, "load_seconds": 0.5}
    found = scrape(Observed(Scripted(**figures, **counts, begun=5, queue_seconds=1.5)))
    expected = {
        "vllm:kv_cache_usage_perc": 0.25,
        "lorary_budget_bytes": 1000,
        "lorary_adapter_bytes": 300,
        "lorary_kv_bytes": 200,
        "lorary_host_bytes": 50,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 10,
        "lorary_adapter_hits_total": 7,
        "lorary_adapter_evictions_total": 2,
        "lorary_adapter_load_seconds_count": 4,
        "lorary_adapter_load_seconds_sum": 0.5,
        "lorary_queue_seconds_count": 5,
        "lorary_queue_seconds_sum": 1.5,
    }
    assert {name: found[f"{name}{{model_name=base}}"] for name in expected} == expected
    assert found["lorary_adapters{model_name=base,state=resident}"] == 1
    assert found["lorary_adapters{model_name=base,state=on disk}"] == 1
    assert any(key.startswith("process_") for key in found)


def test_errors_are_counted_by_reason(tmp_path: Path) -> None:
    engine = Scripted((Finished("error"),), builtin.load_tokenizer())
    app = create_app(engine, Settings(keys={"k": "t"}, body_bytes=1000, headers=20))
    client = TestClient(app, headers={"Authorization": "Bearer k"}, raise_server_exceptions=False)

    def complete(**fields: Any) -> int:
        return client.post("/v1/completions", json={"model": "base", "prompt": "x"} | fields).status_code

    assert complete() == 500
    assert complete(model="nope") == 404
    assert complete(temperature=9) == 400
    assert client.post("/generate", json={"inputs": ""}).status_code == 422
    assert complete(prompt="x" * 2000) == 413
    assert client.get("/v1/models", headers={f"h{i}": "x" for i in range(30)}).status_code == 431
    assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/v1/load_lora_adapter", json={}).status_code == 403
    engine.refuse = BusyError("", [Diagnostic("", "the queue is full")])
    assert complete() == 429
    found = parsed(client.get("/metrics").text)
    counts = {key: value for key, value in found.items() if key.startswith("lorary_rejected_requests_total")}
    reasons = ("busy", "failed", "forbidden", "no valid key", "not found")
    expected = dict.fromkeys(reasons, 1) | {"invalid": 2, "too large": 2}
    assert counts == {f"lorary_rejected_requests_total{{reason={reason}}}": n for reason, n in expected.items()}
    assert found["vllm:num_requests_waiting{model_name=base}"] == 0


def test_every_figure_of_an_engine_has_a_metric(engine: Engine) -> None:
    from lorary.serve.http.metrics import _COUNTERS, _GAUGES, _SUMMARIES

    shown = {key for key, _ in (*_GAUGES.values(), *_COUNTERS.values())} | {"running", "waiting"}
    shown |= {key for count, total, _ in _SUMMARIES.values() for key in (count, total)}
    assert shown == set(Statistics.__annotations__)
    assert set(engine.statistics()) == shown - {"replicas", "retries"}  # it is one


def test_names_that_would_break_the_text_format_do_not() -> None:
    engine = Scripted()
    observed = Observed(engine)
    run(engine, observed, Request((1,), {'a"}\n\\x': 1.0}), Token(5, "x"))
    (gauge,) = (key for key in scrape(observed) if key.startswith("vllm:lora_requests_info"))
    assert 'running_lora_adapters=a"}\n\\x' in gauge


def test_how_many_adapters_fit() -> None:
    cards = [AdapterCard("a", bytes=300), AdapterCard("b", bytes=100), AdapterCard("c")]
    assert adapters_that_fit({"budget_bytes": 1000}, cards) == 5
    assert adapters_that_fit({"budget_bytes": 50}, cards) == 1
    assert adapters_that_fit({}, cards) == 3
    assert adapters_that_fit({"budget_bytes": 1000}, []) == 1


def test_an_observed_engine_passes_on_the_rest() -> None:
    engine = Scripted()
    observed = Observed(engine)
    observed.start()
    observed.cancel("request-1")
    observed.load("n", "folder", replace=True, pinned=True)
    observed.unload("n")
    assert observed.adapter("a") is engine.cards[0]
    observed.stop(2.0)
    assert engine.called == [
        ("start", {}),
        ("cancel", "request-1", {}),
        ("load", "n", "folder", {"replace": True, "pinned": True}),
        ("unload", "n", {}),
        ("stop", 2.0, {}),
    ]
