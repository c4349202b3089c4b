"""The papers' parameter counts, exact, on their models at full size (on the meta device: shapes without memory)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorary


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Each model is made and planned in under ten seconds of processor time."""
    before = time.process_time()
    yield
    assert time.process_time() - before < 10


@cache
def llama_2_7b() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@cache
def gpt_3() -> Any:
    config = transformers.GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(config)


def gpt_2_medium() -> Any:
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))


def bert(size: str, kind: str) -> Any:
    """BERT or RoBERTa, base or large; base is what their configurations say by default."""
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    changes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1} if kind == "Roberta" else {}
    config = getattr(transformers, f"{kind}Config")(**changes, **(large if size == "large" else {}))
    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(config)


def count(model: nn.Module, targets: Any, r: int, *names: str) -> int:
    return lorary.plan(model, lorary.method(*names, r=r), targets).trainable


QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("targets", "r", "expected", "percent"),
    [
        ("attention-qv", 8, 4_194_304, "0.062"),
        (["q_proj", "v_proj"], 8, 4_194_304, "0.062"),
        ("attention-qv", 16, 8_388_608, "0.124"),
        (QKVO, 16, 16_777_216, "0.249"),
        ("attention", 16, 16_777_216, "0.249"),
        ("all-linear", 16, 39_976_960, "0.593"),
        ("all-linear", 64, 159_907_840, "2.373"),
    ],
)
def test_lora_on_llama_2_7b(targets: Any, r: int, expected: int, percent: str) -> None:
    model = llama_2_7b()
    plan = lorary.plan(model, lorary.method("lora", r=r), targets)
    assert plan.trainable == expected
    assert plan.total == 6_738_415_616
    assert f"{plan.share:.3%}" == f"{percent}%"
    assert f"trains    {expected:,} of 6,738,415,616 parameters" in str(plan)


def test_the_linears_of_llama_2_7b() -> None:
    plan = lorary.plan(llama_2_7b(), lorary.method())
    assert len(plan.placed) == 224
    assert sum(p.site.out * p.site.inp for p in plan.placed) == 6_476_005_376


@pytest.mark.parametrize("names", [("rslora",), ("lora+",), ("rslora", "lora+")])
def test_these_train_what_lora_trains(names: tuple[str, ...]) -> None:
    assert count(llama_2_7b(), "all-linear", 16, *names) == 39_976_960


def test_lora_fa_on_llama_2_7b() -> None:
    assert count(llama_2_7b(), "attention-qv", 16, "lora-fa") == 4_194_304


@pytest.mark.parametrize(("target", "share"), [("down_proj", "27%"), ("up_proj", "73%"), ("q_proj", "50%")])
def test_lora_fa_trains_half_of_lora_only_where_layers_are_square(target: str, share: str) -> None:
    model = llama_2_7b()
    assert f"{count(model, target, 16, 'lora-fa') / count(model, target, 16):.0%}" == share


def test_everything_trains_under_full_fine_tuning() -> None:
    plan = lorary.plan(llama_2_7b(), lorary.method("full"))
    assert plan.trainable == plan.total == 6_738_415_616


@pytest.mark.parametrize(("r", "expected"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_lora_on_gpt_3(r: int, expected: int) -> None:
    assert count(gpt_3(), "attention-qv", r) == expected
    assert count(gpt_3(), "c_attn[q,v]", r) == expected


class Separate(nn.Module):
    """GPT-3's queries, keys and values as layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(12288, 12288, device="meta") for name in ("q", "k", "v")}) for _ in range(96)
        )


@pytest.mark.parametrize(("r", "expected"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_lora_on_gpt_3_with_separate_projections(r: int, expected: int) -> None:
    assert count(Separate(), "attention-qv", r) == expected


def test_the_fused_weight_of_gpt_3_as_one_is_another_count() -> None:
    assert count(gpt_3(), "c_attn", 4) == 96 * 4 * (12288 + 3 * 12288)


@pytest.mark.parametrize(("size", "expected"), [("base", 294_912), ("large", 786_432)])
def test_lora_on_roberta(size: str, expected: int) -> None:
    assert count(bert(size, "Roberta"), "attention-qv", 8) == expected


def test_lora_on_gpt_2_medium() -> None:
    assert count(gpt_2_medium(), "attention-qv", 4) == 393_216


@pytest.mark.parametrize(("size", "expected", "percent"), [("base", 102_912, "0.094"), ("large", 272_384, "0.081")])
def test_bitfit_on_bert(size: str, expected: int, percent: str) -> None:
    plan = lorary.plan(bert(size, "Bert"), lorary.method("bitfit"))
    assert plan.trainable == expected
    assert f"{plan.share:.3%}" == f"{percent}%"


def test_an_embedding_costs_r_for_every_token_and_every_feature() -> None:
    assert count(llama_2_7b(), "embedding", 8) == 8 * (32000 + 4096)


def test_a_convolution_costs_r_for_every_weight_of_a_filter_and_every_channel() -> None:
    model = nn.Sequential(nn.Conv2d(64, 128, (3, 5), groups=4))
    assert count(model, "conv", 8) == 8 * (64 // 4 * 15 + 128)
