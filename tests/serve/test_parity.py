"""Mixed batches against one request at a time: every servable method, few in memory, chunks, shared prefixes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

import lorary
from lorary.serve.batch.batch import Batch
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.engine import continuous
from lorary.serve.engine.batching import BatchingEngine
from lorary.serve.engine.continuous import PagedRunner
from lorary.serve.engine.one_at_a_time import OneAtATime
from lorary.serve.engine.runner import Row, Shape
from lorary.serve.forms.form import serving_form
from lorary.serve.open import engine_of
from lorary.serve.request import Request, Sampling
from lorary.serve.scheduler.policy import Policy
from tests import tiny
from tests.laws.cases import made_of

from .running import Answer, answers, difference, saved_adapter, words

VOCABULARY = 64
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None},
}
OPTIONS: dict[str, dict[str, Any]] = {"longlora": {"length": 256}}
NOT_SERVED = ("alora", "houlsby", "prefix-tuning", "prompt-tuning")  # no weight and bias have their function
NAMES = [name for name in lorary.presets() if name not in ("qlora", "loftq", "s-lora", *NOT_SERVED)]
RANKS = (1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 24, 31, 33, 48, 64)
COMBINED = ("dora bitfit", "vera dora", "pissa dora", "lora bitfit", "longlora dora", "rslora lora+", "dora", "lora")
MOST = {"pissa": 32, "olora": 32, "corda": 32, "lora-ga": 16}  # the directions of k and v; LoRA-GA takes 2 r of them
NEED_WEIGHTS = "-(full|glora|delta-lora|olora|pissa|corda|lora-ga)"  # which change the base's, and it is quantised
ADDED = ("lora", "rslora", "loraplus")  # of these requests have weighted sums


def base() -> Any:
    """A base with biases and grouped queries, the same at every call."""
    return tiny.seeded("Qwen2ForCausalLM", **SIZES)


def method_of(names: str, r: int) -> lorary.Method:
    chosen = names.split()
    options = {k: v for name in chosen for k, v in OPTIONS.get(name, {}).items()}
    if not {*chosen} <= {"full", "bitfit"}:
        least = 2 if {"adalora", "melora"} & {*chosen} else 1  # AdaLoRA's target, MELoRA's blocks
        most = min((MOST[name] for name in chosen if name in MOST), default=64)
        options["r"] = min(max(r, least), most) // least * least
    return made_of(*chosen, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """40 adapters: every method once, then combinations and more ranks."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    kinds = [*NAMES, *COMBINED, *(["lora"] * 40)][:40]
    for i, names in enumerate(kinds):
        rank = RANKS[i % len(RANKS)]
        targets = ["q_proj", "down_proj", "lm_head", "embed_tokens"] if names == "lora" and i % 2 else None
        name = f"{i}-{names.replace(' ', '-').replace('+', 'plus')}"
        found[name] = saved_adapter(base(), method_of(names, rank), root / name, targets, size=0.1)
    return found


def requests_of(names: list[str], count: int, seed: int = 0) -> list[Request]:
    """Mixed requests: prompts that share beginnings, some without an adapter, some with two."""
    rng = random.Random(seed)
    shared = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(5, 40))] for _ in range(6)]
    summed = [name for name in names if name.partition("-")[2] in ADDED]
    found = []
    for i in range(count):
        prompt = (*rng.choice(shared), *(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 9))))
        adapters = {names[i % len(names)]: 1.0}
        if i % 7 == 3:
            adapters = {}
        elif i % 7 == 5 and len(summed) > 1:
            adapters = dict(zip(rng.sample(summed, 2), (0.7, 0.4), strict=True))
        sampling = Sampling(max_tokens=rng.randrange(2, 9), temperature=0.0, logprobs=2)
        found.append(Request(prompt, adapters, sampling))
    rng.shuffle(found)
    return found


def small_engine(model: Any, folders: dict[str, str], budget: int = 2 * 2**20, **options: Any) -> BatchingEngine:
    """An engine with little memory: about four adapters fit, prompts are computed in parts."""
    settings: dict[str, Any] = {
        "page": 4,
        "most_tokens_of_batch": 24,
        "policy": Policy(max_adapters=4, patience=0.1),
    } | options
    engine = engine_of(model, words(VOCABULARY), "base", budget=budget, **settings)
    for name, folder in folders.items():
        engine.load(name, folder)
    return engine


def expected_of(model: Any, folders: dict[str, str], requests: list[Request]) -> list[Answer]:
    oracle = OneAtATime(model, words(VOCABULARY), "base", most_waiting=300)
    for name, folder in folders.items():
        oracle.load(name, folder)
    oracle.start()
    order = sorted(range(len(requests)), key=lambda i: sorted(requests[i].adapters.items()))
    found = answers(oracle, [requests[i] for i in order])
    oracle.stop()
    return [answer for _, answer in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def mismatches(engine: BatchingEngine, requests: list[Request], expected: list[Answer]) -> list[str]:
    engine.start()
    try:
        found = answers(engine, requests)
    finally:
        engine.stop()
    pairs = zip(requests, found, expected, strict=True)
    return [f"{r.adapters}: {why}" for r, answer, right in pairs if (why := difference(answer, right))]


def test_three_hundred_mixed_requests(folders: dict[str, str]) -> None:
    requests = requests_of([*folders], 300)
    expected = expected_of(base(), folders, requests)
    assert len({tuple(answer.ids) for answer in expected}) > 200, "the adapters change nothing"
    engine = small_engine(base(), folders)
    found = mismatches(engine, requests, expected)
    assert found == []
    figures = engine.statistics()
    assert figures["evictions"] > 20, "every adapter was in memory at once"
    assert figures["prefix_hits"] > 300, "no prefix was shared"
    assert figures["begun"] == 300
    assert figures["running"] == figures["waiting"] == 0


def test_a_quantised_base(folders: dict[str, str]) -> None:
    names = [name for name in folders if not re.search(NEED_WEIGHTS, name)]
    chosen = {name: folders[name] for name in names[::3]}
    model = lorary.quantize(base())
    requests = requests_of([*chosen], 40)
    expected = expected_of(lorary.quantize(base()), chosen, requests)
    assert mismatches(small_engine(model, chosen), requests, expected) == []


@pytest.fixture(scope="module")
def few(folders: dict[str, str]) -> tuple[dict[str, str], list[Request], list[Answer]]:
    """Requests with the same beginning for different adapters, and the right answers."""
    chosen = {name: folders[name] for name in list(folders)[-4:]}
    prompt = tuple(range(1, 30))
    sampling = Sampling(max_tokens=4, temperature=0.0, logprobs=2)
    requests = [Request((*prompt, i), {name: 1.0}, sampling) for i in range(4) for name in chosen]
    return chosen, requests, expected_of(base(), chosen, requests)


def test_without_the_salt_adapters_share_prefixes(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: the parity test would see it."""
    chosen, requests, expected = few
    assert mismatches(small_engine(base(), chosen), requests, expected) == []
    monkeypatch.setattr(PagedRunner, "_salt_takes", lambda self: True)
    monkeypatch.setattr(Row, "salt", None)
    assert mismatches(small_engine(base(), chosen), requests, expected) != []


def test_a_wrong_table_of_segments_would_be_seen(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, requests, expected = few
    right = Batch.of
    monkeypatch.setattr(Batch, "of", staticmethod(lambda rows: right(rows[1:] + rows[:1])))
    assert mismatches(small_engine(base(), chosen), requests, expected) != []


def test_a_release_in_which_the_salt_has_no_effect_shares_nothing(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, requests, expected = few
    monkeypatch.setattr(continuous.cache_allocator, "compute_block_hash", continuous._plain_hash)
    engine = small_engine(base(), chosen)
    assert mismatches(engine, requests, expected) == []
    assert engine.statistics()["prefix_hits"] == 0


def test_rows_of_the_base_are_the_base_bit_for_bit(folders: dict[str, str]) -> None:
    """Beside rows with adapters, in a batch of the same shape."""
    name, folder = next(iter(folders.items()))
    prompts, logits = [(5, 9, 33, 2), (7, 7, 1)], []
    for with_adapter in (False, True):
        model = base()
        layers = ServedLayers(model)
        runner = PagedRunner(model, layers, Shape(2**20, page=4))
        form = serving_form(lorary.load_adapter(folder), model)
        layers.cover(form)
        runner.add(Row("base", prompts[0]))
        runner.add(Row(name, prompts[1], ((form, 1.0),) if with_adapter else ()))
        seen: dict[str, torch.Tensor] = {}

        def choose(rows: Any, found: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> list[int]:
            seen.update({f"{row.id} {len(seen) // 2}": own.clone() for row, own in zip(rows, found, strict=True)})
            return [3] * len(rows)

        with torch.no_grad():
            runner.step(choose)
            runner.step(choose)
        logits.append(seen)
        runner.close()
    plain, mixed = logits
    assert torch.equal(plain["base 0"], mixed["base 0"])
    assert torch.equal(plain["base 1"], mixed["base 1"])
    assert not torch.equal(plain[f"{name} 0"], mixed[f"{name} 0"])
