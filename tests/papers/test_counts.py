"""The papers' parameter counts, exact, on their models at full size (on the meta device: shapes without memory)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorary
from lorary.methods.adalora import SVDDelta
from lorary.methods.o_lora import SequentialLoRA
from lorary.spec.placement import AdaptedSite


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
    assert len(plan.sites) == 224
    assert sum(p.site.out_features * p.site.in_features for p in plan.sites) == 6_476_005_376


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


# --- the methods that join, start or learn in another way -------------------------------------------------------------


def counted(model: nn.Module, targets: Any, *names: str, **options: Any) -> int:
    return lorary.plan(model, lorary.method(*names, **options), targets).trainable


DORAS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def test_dora_on_llama_2_7b() -> None:
    """LoRA's numbers, and a magnitude for every output."""
    model = llama_2_7b()
    assert counted(model, DORAS, "lora", r=32) == 56_098_816
    plan = lorary.plan(model, lorary.method("dora", r=32), DORAS)
    assert plan.trainable == 56_098_816 + 876_544 == 56_975_360
    assert f"{plan.share:.4%}" == "0.8455%"
    assert counted(model, "all-linear", "dora", r=16) == 39_976_960 + 1_359_872


@pytest.mark.parametrize("names", [("pissa",), ("olora",), ("pissa", "rslora", "lora+"), ("olora", "rslora")])
def test_another_start_trains_what_lora_trains(names: tuple[str, ...]) -> None:
    assert counted(llama_2_7b(), "all-linear", *names, r=16) == 39_976_960
    assert counted(bert("large", "Roberta"), "attention-qv", *names, r=8) == 786_432
    assert counted(gpt_3(), "attention-qv", *names, r=8) == 37_748_736


def test_a_start_in_the_weights_directions_with_lora_fa_trains_b_alone() -> None:
    assert counted(llama_2_7b(), "attention-qv", "pissa", "lora-fa", r=16) == 4_194_304


@pytest.mark.parametrize(("targets", "r", "expected"), [("all-linear", 256, 1_417_216), ("attention-qv", 256, 278_528)])
def test_vera_on_llama_2_7b(targets: str, r: int, expected: int) -> None:
    assert counted(llama_2_7b(), targets, "vera", r=r) == expected


def test_vera_on_gpt_3_trains_less_than_the_papers_table_says() -> None:
    """The table's 2.8M and 8.7M are reached only with the frozen pair that all layers share."""
    for r, trained, table in ((16, 2_362_368, 2_755_584), (256, 2_408_448, 8_699_904)):
        plan = lorary.plan(Separate(), lorary.method("vera", r=r), "attention-qv")
        assert plan.trainable == 192 * (12288 + r) == trained
        assert plan.trainable + r * (12288 + 12288) == table
        assert plan.adapter_bytes == 4 * table  # the pair counts once
    assert counted(gpt_3(), "c_attn[q,v]", "vera", r=16) == 2_362_368


@pytest.mark.parametrize(("size", "r", "expected"), [("base", 1024, 43_008), ("large", 256, 61_440)])
def test_vera_on_roberta(size: str, r: int, expected: int) -> None:
    """As in the paper's table: 0.043M and 0.061M."""
    assert counted(bert(size, "Roberta"), "attention-qv", "vera", r=r) == expected


def test_dvora_on_llama_2_7b() -> None:
    assert counted(llama_2_7b(), "all-linear", "vera", "dora", r=256) == 1_417_216 + 1_359_872


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_melora_trains_the_same_whatever_n_is(n: int) -> None:
    assert counted(llama_2_7b(), "attention-qv", "melora", r=1, n=n) == 524_288
    assert counted(bert("base", "Roberta"), "attention-qv", "melora", r=8, n=n) == 294_912


def test_melora_against_lora_of_its_rank() -> None:
    assert counted(llama_2_7b(), "attention-qv", "lora", r=8) == 8 * 524_288


@pytest.mark.parametrize(("n", "r"), [(1, 8), (3, 32), (3, 96)])
def test_multilora_on_llama_2_7b(n: int, r: int) -> None:
    """n (r (in + out) + out) a layer."""
    expected = sum(
        n * (r * (p.site.in_features + p.site.out_features) + p.site.out_features)
        for p in lorary.plan(llama_2_7b(), lorary.method("lora", r=1)).sites
    )
    assert counted(llama_2_7b(), "all-linear", "multilora", r=r, n=n) == expected
    if (n, r) == (3, 32):
        assert expected == 3 * (2 * 39_976_960 + 1_359_872) == 243_941_376


def test_multilora_on_gpt_3_and_roberta() -> None:
    assert counted(gpt_3(), "attention-qv", "multilora", r=4, n=3) == 192 * 3 * (4 * 2 * 12288 + 12288)
    assert counted(bert("large", "Roberta"), "attention-qv", "multilora", r=8, n=3) == 3 * (786_432 + 48 * 1024)


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("dora",), {"r": 4}, 4 * (32000 + 4096) + 4096),
        (("vera",), {"r": 4}, 4 + 4096),
        (("melora",), {"r": 4, "n": 8}, 4 * (32000 + 4096)),
        (("multilora",), {"r": 4, "n": 2}, 2 * (4 * (32000 + 4096) + 4096)),
        (("pissa",), {"r": 4}, 4 * (32000 + 4096)),
    ],
)
def test_an_embedding(names: tuple[str, ...], options: dict[str, int], expected: int) -> None:
    assert counted(llama_2_7b(), "embedding", *names, **options) == expected


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("dora",), {"r": 8}, 8 * (240 + 128) + 128),
        (("vera",), {"r": 8}, 8 + 128),
        (("melora",), {"r": 8, "n": 4}, 8 * (240 + 128)),
        (("multilora",), {"r": 8, "n": 2}, 2 * (8 * (240 + 128) + 128)),
        (("olora",), {"r": 8}, 8 * (240 + 128)),
    ],
)
def test_a_convolution(names: tuple[str, ...], options: dict[str, int], expected: int) -> None:
    """16 channels of a group times a window of 3 x 5, and 128 filters."""
    model = nn.Sequential(nn.Conv2d(64, 128, (3, 5), groups=4))
    assert counted(model, "conv", *names, **options) == expected


# --- the methods that do something while they train -------------------------------------------------------------------


@cache
def deberta_v3_base() -> Any:
    config = transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    with torch.device("meta"):
        return transformers.DebertaV2Model(config)


SIX = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [({"r": 12, "target": 8}, 1_991_520, 1_327_680), ({"r": 3, "target": 2}, 497_880, 331_920)],
)
def test_adalora_on_deberta_v3_base(options: dict[str, int], start: int, end: int) -> None:
    """At the start, and with as many directions left as the target says, whichever layers they are in."""
    method = lorary.method("adalora", **options)
    plan = lorary.plan(deberta_v3_base(), method, SIX)
    assert len(plan.sites) == 72
    assert plan.trainable == start
    left = method.replace(delta=SVDDelta(options["r"], kept=options["target"]))
    assert sum(AdaptedSite(p.site, left).trainable for p in plan.sites) == end


def test_adalora_on_llama_7b() -> None:
    assert counted(llama_2_7b(), "attention-qv", "adalora", r=12) == 6_292_224


def test_what_follows_the_product_trains_what_lora_trains() -> None:
    plan = lorary.plan(llama_2_7b(), lorary.method("delta-lora", r=8), "attention-qv")
    assert plan.trainable == 4_194_304
    assert plan.adapter_bytes == 4 * (2 * 4_194_304 + 64)  # the product of step K besides, and lambda
    paper = lorary.plan(llama_2_7b(), lorary.method("delta-lora", r=8, mode="paper"), "attention-qv")
    assert paper.trainable == 4_194_304
    assert [f.trains for f in paper.full] == [False] * 64
    assert paper.training_bytes == 12 * 4_194_304


def test_a_task_of_o_lora_trains_what_lora_trains() -> None:
    method = lorary.method("o-lora", r=8)
    plan = lorary.plan(llama_2_7b(), method, "attention-qv")
    assert plan.trainable == plan.adapter_bytes // 4 == 4_194_304
    fourth = method.replace(delta=SequentialLoRA(8, past=(8, 8, 8)))
    placed = [AdaptedSite(p.site, fourth) for p in plan.sites]
    assert sum(p.trainable for p in placed) == 4_194_304
    assert sum(math.prod(shape) for p in placed for shape in p.shapes.values()) == 4 * 4_194_304
