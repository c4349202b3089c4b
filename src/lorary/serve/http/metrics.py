"""Prometheus metrics: under vLLM's names, by which routers and dashboards know them, and some of our own.

The Gateway API's endpoint picker reads `vllm:num_requests_waiting`, `vllm:kv_cache_usage_perc` and
`vllm:lora_requests_info`; of the last it takes the series with the newest time, and here there is only one.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorary.serve.interface import AdapterCard, Statistics

# Upper bounds in seconds.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_END_TO_END = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480)

# Metric -> (key of the statistics, description), for the figures that an engine may know.
_GAUGES = {
    "vllm:kv_cache_usage_perc": ("kv_usage", "Share of the room for keys and values in use, 0 to 1."),
    "lorary_budget_bytes": ("budget_bytes", "Budget of adapters and keys and values together."),
    "lorary_adapter_bytes": ("adapter_bytes", "Bytes of the adapters beside the base."),
    "lorary_kv_bytes": ("kv_bytes", "Bytes of keys and values."),
    "lorary_host_bytes": ("host_bytes", "Bytes of the adapters in host memory."),
    "lorary_replicas": ("replicas", "Replicas of the engine."),
}
_COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "lorary_adapter_hits": ("hits", "Requests whose adapters were in memory."),
    "lorary_adapter_evictions": ("evictions", "Adapters that gave way to others."),
    "lorary_retries": ("retries", "Requests sent to another replica, since theirs had died."),
}
_SUMMARIES = {
    "lorary_adapter_load_seconds": ("loads", "load_seconds", "Loads of adapters from disk."),
    "lorary_queue_seconds": ("begun", "queue_seconds", "Waiting of requests before they joined the batch."),
}


# Status -> reason of a refusal.
_REASONS = {
    400: "invalid",
    401: "no valid key",
    403: "forbidden",
    404: "not found",
    408: "slow client",
    413: "too large",
    415: "invalid",
    422: "invalid",
    429: "busy",
    431: "too large",
    503: "unavailable",
}


class Source(Protocol):
    """Where the figures of this moment are read from, at each scrape.

    Attributes:
        name: of the base.
        changed: Unix time of the last change of `in_use`.
    """

    name: str
    changed: float

    def adapters(self) -> list[AdapterCard]: ...
    def statistics(self) -> Statistics: ...
    def in_use(self) -> tuple[list[str], list[str]]:
        """The names of the adapters with running requests, and of those that only have waiting ones."""
        ...


class Metrics:
    """The instruments of a server, in a registry of their own.

    Args:
        source: where the figures of this moment come from.
    """

    def __init__(self, source: Source) -> None:
        registry = self.registry = CollectorRegistry()
        self.model = source.name

        def histogram(name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{name}_seconds", text, ["model_name"], buckets=bounds, registry=registry)
            return family.labels(model_name=self.model)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.first_token = histogram("time_to_first_token", "From arrival to the first token.", _FIRST_TOKEN)
        self.between_tokens = histogram("inter_token_latency", "From one token to the next.", _BETWEEN_TOKENS)
        self.end_to_end = histogram("e2e_request_latency", "From arrival to the end.", _END_TO_END)
        tokens = {"model_name": self.model}
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.", "model_name").labels(**tokens)
        self.new_tokens = counter("vllm:generation_tokens", "Tokens generated.", "model_name").labels(**tokens)
        self._finished = counter("vllm:request_success", "Requests by their end.", "model_name", "finished_reason")
        self._rejected = counter("lorary_rejected_requests", "Requests that were answered with an error.", "reason")
        registry.register(_Moment(source))
        ProcessCollector(registry=registry)

    def finished(self, reason: str) -> None:
        """Count a request that ended; vLLM calls a cancelled one `abort`."""
        reason = "abort" if reason == "cancelled" else reason
        self._finished.labels(model_name=self.model, finished_reason=reason).inc()

    def rejected(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._rejected.labels(reason=_REASONS.get(status, "failed")).inc()


class CountErrors:
    """Middleware that counts error answers, those of other middleware too: it is the outermost."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.metrics.rejected(message["status"])
            await send(message)

        await self.app(scope, receive, counted)


class _Moment(Collector):
    """The figures that are read at the scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        statistics, cards = dict[str, Any](self._source.statistics()), self._source.adapters()
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", statistics["running"])
        yield self._gauge("vllm:num_requests_waiting", "Requests before the batch.", statistics["waiting"])
        for name, (key, text) in _GAUGES.items():
            if key in statistics:
                yield self._gauge(name, text, statistics[key])
        for name, (key, text) in _COUNTERS.items():
            if key in statistics:
                counter = CounterMetricFamily(name, text, labels=["model_name"])
                counter.add_metric([self._source.name], statistics[key])
                yield counter
        for name, (count, total, text) in _SUMMARIES.items():
            if {count, total} <= statistics.keys():
                summary = SummaryMetricFamily(name, text, labels=["model_name"])
                summary.add_metric([self._source.name], statistics[count], statistics[total])
                yield summary
        states = GaugeMetricFamily("lorary_adapters", "Adapters by state.", labels=["model_name", "state"])
        for state, number in sorted(Tally(card.state for card in cards).items()):
            states.add_metric([self._source.name, state], number)
        yield states
        yield self._lora(statistics, cards)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._source.name], value)
        return gauge

    def _lora(self, statistics: Mapping[str, Any], cards: list[AdapterCard]) -> GaugeMetricFamily:
        running, waiting = self._source.in_use()
        labels = {
            "max_lora": str(adapters_that_fit(statistics, cards)),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": ",".join(waiting),
        }
        text = "Adapters of running and of waiting requests; the value is the Unix time of the last change."
        gauge = GaugeMetricFamily("vllm:lora_requests_info", text, labels=list(labels))
        gauge.add_metric(list(labels.values()), self._source.changed)
        return gauge


def adapters_that_fit(statistics: Mapping[str, Any], cards: list[AdapterCard]) -> int:
    """How many adapters of the mean size the budget holds, for routers: there are no slots, ranks are paid for as they
    are. All of them if the engine has no budget.
    """
    sizes = [card.bytes for card in cards if card.bytes]
    if not sizes or not statistics.get("budget_bytes"):
        return max(1, len(cards))
    return max(1, int(statistics["budget_bytes"] * len(sizes) // sum(sizes)))


def metrics_router(metrics: Metrics) -> APIRouter:
    """GET /metrics, as Prometheus' text: OpenMetrics' encoder would write the colons of vLLM's names as underscores."""
    router = APIRouter()

    @router.get("/metrics")
    def scrape() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    return router
