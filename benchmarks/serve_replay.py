"""Requests are replayed, over HTTP or in process, and measured."""

from __future__ import annotations

import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lorary.serve.interface import Engine
from lorary.serve.request import Event, Finished, Request, Sampling, Token
from serve_workload import Call


@dataclass
class Answer:
    """The answer to a call: the times of its tokens, and what they are where the server says so."""

    call: Call
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    generated: int = 0
    error: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent


Ask = Callable[[Answer], None]  # sends a call, and returns at the end of its answer


def in_process(engine: Engine) -> Ask:
    """Asks an engine of this process."""

    def ask(answer: Answer) -> None:
        def deliver(event: Event) -> None:
            if isinstance(event, Token):
                answer.times.append(time.perf_counter())
                answer.tokens.append(event.id)
            else:
                assert isinstance(event, Finished)
                answer.generated, answer.error = event.generated_tokens, event.error
                answer.over.set()

        call = answer.call
        adapters = {call.adapter: 1.0} if call.adapter else {}
        sampling = Sampling(max_tokens=call.max_tokens, temperature=0.0, ignore_eos=True)
        answer.sent = time.perf_counter()
        engine.submit(Request(tuple(call.prompt), adapters, sampling), deliver)
        answer.over.wait()

    return ask


def over_http(url: str, base: str, key: str = "") -> Ask:
    """Asks an OpenAI server, streaming; `base` is what the server calls its base."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(answer: Answer) -> None:
        call = answer.call
        body: dict[str, Any] = {"model": call.adapter or base, "prompt": call.prompt, "max_tokens": call.max_tokens}
        body |= {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
        answer.sent = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.error = f"{response.status}: {response.read(500)!r}"
            return
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if chunk.get("choices"):
                    answer.times.append(time.perf_counter())
                if usage := chunk.get("usage"):
                    answer.generated = usage["completion_tokens"]
        connection.close()

    return ask


def closed_loop(ask: Ask, calls: Sequence[Call], concurrency: int) -> tuple[list[Answer], float]:
    """All calls, so many at a time: the answers, and the seconds from the first to the last."""
    answers = [Answer(call) for call in calls]
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(ask, answers))
    return answers, time.perf_counter() - start


def open_loop(ask: Ask, calls: Sequence[Call]) -> tuple[list[Answer], float]:
    """Each call at its time, whatever has become of the others."""
    answers = [Answer(call) for call in calls]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as pool:
        for answer in answers:
            time.sleep(max(start + answer.call.at - time.perf_counter(), 0.0))
            pool.submit(ask, answer)
    return answers, time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 90th and 99th percentile, in milliseconds."""
    if len(values) < 2:
        values = [*values, *values] or [0.0, 0.0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    found = {"mean": statistics.fmean(values), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
    return {name: 1e3 * value for name, value in found.items()}


def figures(answers: Sequence[Answer], seconds: float, slo: tuple[float, float]) -> dict[str, Any]:
    """What the answers show; latencies are those of answers whose tokens have times.

    Args:
        slo: seconds to the first token, and for each further token, within which an answer is good.
    """
    failed = [answer for answer in answers if answer.error]
    right = [answer for answer in answers if not answer.error]
    good = [answer for answer in right if answer.times]
    each = [
        (answer.times[-1] - answer.times[0]) / (answer.generated - 1) if answer.generated > 1 else 0.0
        for answer in good
    ]
    met = [answer.first <= slo[0] and t <= slo[1] for answer, t in zip(good, each, strict=True)]
    gaps = [b - a for answer in good for a, b in itertools.pairwise(answer.times)]
    return {
        "requests_per_second": len(right) / seconds,
        "tokens_per_second": sum(answer.generated for answer in right) / seconds,
        "ttft_ms": spread([answer.first for answer in good]),
        "itl_ms": spread(gaps),
        "tpot_ms": spread(each),
        "slo": sum(met) / len(answers),
        "failed": len(failed),
        "first_error": failed[0].error if failed else "",
    }
