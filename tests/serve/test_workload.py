"""The serving benchmark: a workload equal for equal seeds, with the popularity and rate that it says; its figures."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("without the benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("serve_workload", monkeypatch)


def counts(module: Any, popularity: str, n: int = 10, requests: int = 5000) -> list[int]:
    found = Counter(module.names(module.Workload(requests, adapters=n, popularity=popularity)))
    return [found[f"a{i}"] for i in range(n)]


def test_adapters_differ_in_nothing_else(module: Any, tmp_path: Path) -> None:
    """The same times, prompts and lengths for every number of adapters; a trace is read as it was written."""
    few, many = (module.Workload(50, adapters=n, popularity=p) for n, p in ((1, "uniform"), (1000, "zipf:1.2")))
    first, second = module.calls(few), module.calls(many)
    assert [call._replace(adapter="") for call in first] == [call._replace(adapter="") for call in second]
    assert len({call.adapter for call in second}) > 10
    assert module.calls(dataclasses.replace(few, seed=1)) != first
    module.write(tmp_path / "trace.jsonl", many, second)
    assert module.read(tmp_path / "trace.jsonl") == second
    assert {call.adapter for call in module.calls(dataclasses.replace(few, adapters=0))} == {""}


def test_popularity(module: Any) -> None:
    assert counts(module, "identical") == [5000] + [0] * 9
    assert counts(module, "distinct") == [500] * 10
    assert all(400 < n < 600 for n in counts(module, "uniform"))
    zipf = counts(module, "zipf:1")
    assert zipf[0] / 5000 == pytest.approx(1 / 2.929, rel=0.1)  # the tenth harmonic number
    assert zipf[0] / zipf[4] == pytest.approx(5, rel=0.25)
    power = counts(module, "power:0.5")  # P(index < k) = sqrt(k / n)
    assert power[0] / 5000 == pytest.approx(0.1**0.5, rel=0.1)
    with pytest.raises(SystemExit, match="'zipff:1' is none of uniform, zipf"):
        counts(module, "zipff:1")


def test_rate_lengths_and_common_beginnings(module: Any) -> None:
    work = module.Workload(2000, rate=20.0, cv=2.0, adapters=3, prompt=(8, 16), generated=(4, 4), shared=0.5)
    found = module.calls(work)
    gaps = [b.at - a.at for a, b in itertools.pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 20, rel=0.1)
    assert deviation / mean == pytest.approx(2.0, rel=0.15)
    assert {len(call.prompt) for call in found} == set(range(8, 17))
    assert {call.max_tokens for call in found} == {4}
    beginnings = {(call.adapter, *call.prompt[:4]) for call in found}
    assert len(beginnings) == 3


def test_figures_and_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of known answers; a closed loop never has more in flight than it may."""
    replay = benchmark("serve_replay", monkeypatch)
    call = benchmark("serve_workload", monkeypatch).Call(0.0, "a0", [17], 3)
    answers = [replay.Answer(call, sent=1.0, times=[1.1, 1.3, 1.5], generated=3) for _ in range(9)]
    answers.append(replay.Answer(call, sent=1.0, times=[2.0, 2.1, 2.2], generated=3))
    answers.append(replay.Answer(call, error="503"))
    found = replay.figures(answers, 2.0, (0.5, 0.25))
    assert (found["requests_per_second"], found["tokens_per_second"], found["failed"]) == (5.0, 15.0, 1)
    assert found["ttft_ms"]["p50"] == pytest.approx(100)
    assert found["ttft_ms"]["mean"] == pytest.approx(190)
    assert found["tpot_ms"]["p50"] == found["itl_ms"]["p90"] == pytest.approx(200)
    assert found["slo"] == pytest.approx(9 / 11)
    running, most, lock = 0, 0, threading.Lock()

    def ask(answer: Any) -> None:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.001)
        with lock:
            running -= 1

    answers, seconds = replay.closed_loop(ask, [call] * 20, 4)
    assert most <= 4
    assert (len(answers), seconds > 0) == (20, True)
    calls = [call._replace(at=i / 100) for i in range(5)]
    starts = []
    replay.open_loop(lambda answer: starts.append(answer.call.at), calls)
    assert sorted(starts) == [call.at for call in calls]
