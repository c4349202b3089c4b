"""The metrics: every figure against what really happened, read by Prometheus' own parser."""

from __future__ import annotations

import time

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.serve.engine import AdapterCard, BusyError, RequestError, UnknownAdapterError
from lorary.serve.http.metrics import adapters_that_fit, metrics_router
from lorary.serve.http.observed import Observed
from lorary.serve.request import Event, Finished, Request, Token
from tests.serve.http.scripted import Scripted


def scrape(observed: Observed, accept: str = "") -> dict[str, float]:
    """`name{label=value,...}` -> value, from what the route answers."""
    app = FastAPI()
    app.include_router(metrics_router(observed.metrics))
    answer = TestClient(app).get("/metrics", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()))}}}": s.value
        for family in text_string_to_metric_families(answer.text)
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


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnknownAdapterError("", [Diagnostic("x", "unknown")]), "unknown adapter"),
        (RequestError("", [Diagnostic("prompt", "too long")]), "invalid request"),
        (BusyError("", [Diagnostic("", "the queue is full")]), "busy"),
        (FileError("", [Diagnostic("x", "rank 4096")]), "adapter"),
    ],
)
def test_what_the_engine_refuses_is_counted_by_reason(error: LoraryError, reason: str) -> None:
    engine = Scripted()
    engine.refuse, observed = error, Observed(engine)
    with pytest.raises(type(error)):
        observed.submit(Request((1,), {"x": 1.0}), lambda event: None)
    found = scrape(observed)
    assert found[f"lorary_rejected_requests_total{{reason={reason}}}"] == 1
    assert found["vllm:num_requests_waiting{model_name=base}"] == 0


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
