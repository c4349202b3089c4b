"""Continuous batching: which models it computes as they compute themselves, and what happens to the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers

import lorary
from lorary.errors import LoraryError
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.engine import continuous
from lorary.serve.engine.continuous import PagedRunner
from lorary.serve.engine.padded import PaddedRunner
from lorary.serve.engine.probe import Probe
from lorary.serve.engine.runner import Row, Runner, Shape
from lorary.serve.open import choose_runner, engine_of
from lorary.serve.request import Request, Sampling
from tests import architectures, tiny
from tests.laws.cases import made_of
from tests.serve.running import answers, saved_adapter, words

SHAPE = Shape(2**20, page=4, tokens=16)
DENSE = ("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel", "PhiForCausalLM")
WINDOWS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 6},
    "Gemma2ForCausalLM": {"sliding_window": 6},
    "Gemma3ForCausalLM": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOssForCausalLM": {"sliding_window": 7},
}
# Continuous batching refuses these, or computed them wrongly, in one release or another: ALiBi, positions that are not
# asked for, keys and values of different sizes, states in place of keys and values.
HARD = (
    *("GPTJForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "DeepseekV3ForCausalLM", "BambaForCausalLM"),
    *("Qwen3NextForCausalLM", "MambaForCausalLM"),
)


def model(name: str, **changes: Any) -> Any:
    settings = architectures.ARCHITECTURES[name] | changes
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**settings)).eval()


def continued(runner: Runner, prompts: dict[str, list[int]], count: int) -> dict[str, list[int]]:
    """The greedy tokens after several prompts."""
    found: dict[str, list[int]] = {id: [] for id in prompts}

    def choose(rows: Any, logits: torch.Tensor) -> list[int]:
        tokens: list[int] = logits.argmax(-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            found[row.id].append(token)
        return tokens

    for id, prompt in prompts.items():
        runner.add(Row(id, tuple(prompt)))
    with torch.no_grad():
        for _ in range(1000):
            for id in [id for id, tokens in found.items() if len(tokens) == count]:
                runner.remove(id)
            if all(len(tokens) == count for tokens in found.values()):
                break
            runner.step(choose)
    return found


def alone(base: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens after a prompt, by whole forward passes."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(tiny.logits(base, input_ids=torch.tensor([tokens]), use_cache=False)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", [*DENSE, *WINDOWS])
def test_it_computes_what_the_model_computes(name: str) -> None:
    """Full attention, windows shorter than the prompts, softcaps and sinks; prompts in parts of 16 tokens."""
    base = model(name, **WINDOWS.get(name, {}))
    prompts = {f"{n}": [(7 * i + n) % 36 + 3 for i in range(n)] for n in (1, 3, 6, 11, 23, 30)}
    expected = {id: alone(base, prompt, 9) for id, prompt in prompts.items()}
    runner = PagedRunner(base, ServedLayers(base), SHAPE)
    found = continued(runner, prompts, 9)
    runner.close()
    assert found == expected
    assert runner.used_bytes() == 0
    assert {id: alone(base, prompt, 9) for id, prompt in prompts.items()} == expected, "the model is as it was"


@pytest.mark.parametrize("name", HARD)
def test_what_it_does_not_compute_rightly_is_computed_otherwise(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = model(name)
    prompts = {f"{n} {i}": [(5 * k + n + i) % 36 + 3 for k in range(n)] for n in (2, 5, 9) for i in range(2)}
    expected = {id: alone(base, prompt, 6) for id, prompt in prompts.items()}
    with caplog.at_level(logging.WARNING, logger="lorary"):
        runner = choose_runner(base, ServedLayers(base), "the base", SHAPE)
    assert continued(runner, prompts, 6) == expected
    said = f"the base is computed in {runner.kind}, which is slower (continuous batching: "
    assert (said in caplog.text) == isinstance(runner, PaddedRunner)
    if name == "MambaForCausalLM":  # its layers have no keys and values, and padding passes through its convolution
        assert runner.kind == "batches of prompts of equal length"


@pytest.mark.parametrize("name", ["MambaForCausalLM", "BambaForCausalLM", "BloomForCausalLM"])
def test_hard_models_serve_adapters(name: str, tmp_path: Any) -> None:
    methods = {"a": made_of("lora"), "b": made_of("rslora", r=5)}
    for adapter, method in methods.items():
        saved_adapter(model(name), method, tmp_path / adapter, size=0.2)
    engine = engine_of(model(name), words(40), "base", budget=2**20)
    for adapter in methods:
        engine.load(adapter, str(tmp_path / adapter))
    sampling = Sampling(max_tokens=5, temperature=0.0, ignore_eos=True)
    prompts = [[3, 5, 9], [11, 4], [8, 8, 20, 21, 22], [30, 31, 32], [6]]
    requests = [Request(tuple(p), {n: 1.0} if n else {}, sampling) for p in prompts for n in ("", "a", "b")]
    engine.start()
    found = answers(engine, requests)
    engine.stop()
    expected = {}
    for adapter in ("", "a", "b"):
        base = model(name)
        if adapter:
            lorary.switch(base, lorary.load_adapter(tmp_path / adapter))
        expected |= {(tuple(prompt), adapter): alone(base, prompt, 5) for prompt in prompts}
    for request, answer in zip(requests, found, strict=True):
        assert answer.ids == expected[request.prompt, next(iter(request.adapters), "")]
    assert len({tuple(ids) for ids in expected.values()}) > 8


def test_a_request_alone_is_restarted_and_computed_again() -> None:
    """In both runners: what a failed forward pass leaves to do."""
    base = tiny.llama()
    for runner in (PagedRunner(base, ServedLayers(base), SHAPE), PaddedRunner(base, ServedLayers(base), SHAPE)):
        calls: list[list[str]] = []
        tokens: dict[str, list[int]] = {"a": [], "b": []}

        def choose(
            rows: Any,
            logits: torch.Tensor,
            calls: list[list[str]] = calls,
            tokens: dict[str, list[int]] = tokens,
        ) -> list[int]:
            calls.append(sorted(row.id for row in rows))
            for row, one in zip(rows, logits.argmax(-1).tolist(), strict=True):
                tokens[row.id].append(one)
            return [tokens[row.id][-1] for row in rows]

        for id in tokens:
            runner.add(Row(id, (5, 9, 2)))
        with torch.no_grad():
            for _ in range(2):
                runner.step(choose)
            runner.restart("a")
            runner.step(choose, only="a")
            runner.step(choose, only="b")
            for _ in range(4):
                runner.step(choose)
        assert calls[2:4] == [["a"], ["b"]]
        for id in tokens:
            runner.remove(id)
        runner.close()
        for id in tokens:
            assert tokens[id] == alone(base, [5, 9, 2], len(tokens[id]))


def test_a_model_that_nothing_computes_rightly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "error", lambda self, runner: 0.5)
    base = tiny.llama()
    with pytest.raises(LoraryError) as refusal:
        choose_runner(base, ServedLayers(base), "the base", SHAPE)
    assert str(refusal.value).splitlines() == [
        "cannot serve the base:",
        "  - continuous batching: its logits differ by 0.5 of the largest",
        "  - padded batches: its logits differ by 0.5 of the largest",
        "  - batches of prompts of equal length: its logits differ by 0.5 of the largest",
    ]


@pytest.mark.parametrize("version", ["5.22.1", "5.25.0", "6.0.0.dev0"])
def test_other_releases_of_transformers_are_refused(version: str) -> None:
    continuous.check_release("5.23.4")
    continuous.check_release("5.24.0")
    with pytest.raises(LoraryError, match=r"its continuous batching is known in 5\.23 and 5\.24 alone"):
        continuous.check_release(version)


def test_prefixes_are_shared_by_the_same_adapters_alone(tmp_path: Any) -> None:
    folder = saved_adapter(tiny.seeded("LlamaForCausalLM"), made_of("lora"), tmp_path / "a")
    base = tiny.seeded("LlamaForCausalLM")
    engine = engine_of(base, words(40), "base", budget=2**20, page=4)
    engine.load("a", folder)
    engine.start()
    prompt, cached = tuple(range(1, 22)), []
    for adapters in ({}, {"a": 1.0}, {"a": 0.5}, {}, {"a": 1.0}, {"a": 0.5}):
        (answer,) = answers(engine, [Request(prompt, adapters, Sampling(max_tokens=2, temperature=0.0))])
        cached.append(answer.end.cached_tokens)
    assert cached == [0, 0, 0, 20, 20, 20]
    engine.stop()
