"""The default budget: the figure for several models, its bounds, and an engine that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import lorary
from lorary.layers.nf4 import NF4
from lorary.model.loading.from_pretrained import load_model, load_tokenizer
from lorary.model.loading.source import ModelSection
from lorary.serve.budget import adapter_bytes, default_budget, most_budget, needed_bytes, token_bytes
from lorary.serve.engine.continuous import PagedRunner
from lorary.serve.open import engine_of
from lorary.serve.scheduler.policy import Policy
from tests import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGE = 32


def builtin(**options: Any) -> Any:
    return load_model(ModelSection.of("builtin:base", dtype="float32"), **options)


def llama(**changes: Any) -> Any:
    return tiny.seeded("LlamaForCausalLM", **changes)


def test_the_keys_and_values_of_a_token() -> None:
    grouped, gpt2 = (
        tiny.seeded("Qwen2ForCausalLM", num_attention_heads=4, num_key_value_heads=2),
        tiny.seeded("GPT2LMHeadModel"),
    )
    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    layers, width = grouped.config.num_hidden_layers, grouped.config.hidden_size // 4
    assert token_bytes(grouped) == 2 * layers * 2 * width * 4
    assert token_bytes(grouped.to(torch.bfloat16)) == 2 * layers * 2 * width * 2
    assert token_bytes(gpt2) == 2 * gpt2.config.n_layer * gpt2.config.n_embd * 4
    assert token_bytes(mamba) == 0
    assert needed_bytes(mamba, Policy(), PAGE, CPU) == 2 * 32 * adapter_bytes(mamba, 16) > 0


@pytest.mark.parametrize("make", [builtin, lambda: tiny.seeded("GPT2LMHeadModel"), lambda: builtin(storage=NF4())])
def test_the_room_for_an_adapter_is_its_real_size(make: Any) -> None:
    model = make()
    room = adapter_bytes(model, 16)
    plan = lorary.plan(model, lorary.method("lora", r=16), "all-linear")
    assert room == 4 * plan.trainable


def test_the_figure_on_a_cpu_and_on_a_gpu() -> None:
    """64 requests of the context, of 4,096 tokens at most on a CPU, and 32 adapters."""
    base = builtin()
    token, adapters = 2 * 6 * 3 * 32 * 4, 32 * adapter_bytes(base, 16)
    assert token_bytes(base) == token
    for device in (CPU, CUDA):
        assert needed_bytes(base, Policy(), PAGE, device) == 64 * 256 * token + adapters
    long = llama(max_position_embeddings=100_000)
    token, adapters = token_bytes(long), 32 * adapter_bytes(long, 16)
    assert needed_bytes(long, Policy(), PAGE, CPU) == 64 * 4096 * token + adapters
    assert needed_bytes(long, Policy(), PAGE, CUDA) == 64 * 100_000 * token + adapters


def test_half_of_it_holds_the_adapters_or_the_longest_request() -> None:
    model = llama(max_position_embeddings=8)
    few, many = Policy(max_running=1, max_adapters=1), Policy(max_running=1, max_adapters=1000)
    assert needed_bytes(model, many, PAGE, CPU) == 2 * 1000 * adapter_bytes(model, 16)
    long = llama(max_position_embeddings=2**20)
    assert needed_bytes(long, few, PAGE, CPU) == 2 * token_bytes(long) * (2**20 + 2 * PAGE)


def test_it_is_never_more_than_the_host_can_spare() -> None:
    endless = llama(max_position_embeddings=2**40)
    assert needed_bytes(endless, Policy(), PAGE, CPU) > 2**31
    assert 0 < default_budget(endless, Policy(), page=PAGE, merged=0) <= 2**31
    assert 0 < most_budget(CPU) <= 2**31
    small = llama(max_position_embeddings=8)
    assert default_budget(small, Policy(), page=PAGE, merged=7) == needed_bytes(small, Policy(), PAGE, CPU) + 7


@pytest.mark.parametrize("running", [1, 64])
def test_an_engine_takes_no_more_and_computes_the_whole_context(running: int) -> None:
    model, policy = builtin(), Policy(max_running=running, max_adapters=2)
    engine = engine_of(model, load_tokenizer(ModelSection.of("builtin:base")), "base", policy=policy)
    try:
        assert isinstance(engine.runner, PagedRunner)
        needed = needed_bytes(model, policy, PAGE, CPU)
        assert 0.95 * needed < engine.statistics()["budget_bytes"] <= needed
        assert engine.runner.most_tokens is not None
        assert engine.runner.most_tokens >= 256
        assert engine.layers.merged is not None  # beside it, as with the largest budget
    finally:
        engine.stop()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_four_fifths_of_what_is_free() -> None:
    free = torch.cuda.mem_get_info()[0]
    assert abs(most_budget(torch.device("cuda", 0)) - 0.8 * free) < 0.05 * free
