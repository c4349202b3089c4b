"""The closed form is what a step without data counts, what the layers say of themselves, and what others measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import pytest
import torch
from benchmarks.published import CASES, LLAMA_3_1_8B, Convention, peak
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorary
from lorary.errors import PlanError
from lorary.footprint.adapters import Layer, held, linear
from lorary.footprint.architecture import architecture
from lorary.footprint.known import by_words
from lorary.footprint.prediction import predict
from lorary.footprint.room import CONTEXT, GB, need
from lorary.footprint.skeleton import KNOWN, skeleton
from lorary.footprint.workload import Workload
from lorary.storage.nf4 import NF4
from lorary.train.memory import estimate

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 300}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300}
bf16 = torch.bfloat16


def make(family: str = "llama", **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **((GPT2 if family == "gpt2" else SIZES) | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def planned(model: nn.Module, *presets: str, targets: str = "all-linear", **options: Any) -> lorary.Plan:
    return lorary.plan(model, lorary.method(*presets, **options), targets)


# --- the same as a step without data ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "presets", "options", "changes", "tolerance"),
    [
        ("llama", ("lora",), {"r": 8}, {}, 0.002),
        ("llama", ("lora",), {"r": 8}, {"padding": True, "dtype": bf16}, 0.002),
        ("llama", ("lora",), {"r": 8, "dropout": 0.1}, {"checkpointing": True}, 0.02),
        ("llama", ("lora-fa",), {"r": 8}, {"dtype": bf16}, 0.005),
        ("llama", ("dora",), {"r": 8}, {"checkpointing": True}, 0.06),
        ("llama", ("vera",), {"r": 16}, {}, 0.01),
        ("llama", ("qlora", "adalora"), {"r": 8}, {}, 0.01),
        ("llama", ("full",), {}, {}, 0.01),
        ("gpt2", ("lora",), {"r": 8}, {"checkpointing": True}, 0.01),
        ("qwen3", ("lora",), {"r": 8}, {}, 0.002),
        ("gemma3_text", ("lora",), {"r": 8}, {"dtype": bf16, "checkpointing": True}, 0.1),
    ],
)
def test_the_formula_is_what_a_step_without_data_counts(
    family: str, presets: tuple[str, ...], options: dict[str, Any], changes: dict[str, Any], tolerance: float
) -> None:
    model = make(family)
    plan = planned(model, *presets, **options)
    work = Workload(4, 128, **changes)
    found = predict(model, plan, work)
    counted = estimate(
        model,
        plan,
        batch=4,
        length=128,
        dtype=work.dtype,
        gradient_checkpointing=work.checkpointing,
        padding=work.padding,
    )
    assert found.fixed == counted.fixed
    assert found.moving == pytest.approx(counted.moving, rel=tolerance)
    assert found.activations == pytest.approx(counted.activations, rel=tolerance)


def test_the_comparison_can_fail() -> None:
    model = make()
    plan = planned(model, "lora", r=8)
    counted = estimate(model, plan, batch=4, length=128)
    assert predict(model, plan, Workload(4, 160)).moving > 1.1 * counted.moving
    assert predict(model, planned(model, "lora", r=8, targets="mlp"), Workload(4, 128)).moving < 0.95 * counted.moving


def test_eager_attention_keeps_scores_and_autocast_copies_of_the_weights() -> None:
    model = make(_attn_implementation="eager")
    plan = planned(model, "lora", r=8)
    short, long = (predict(model, plan, Workload(2, length)) for length in (128, 512))
    assert long.activations > 6 * short.activations  # type: ignore[operator]
    assert any("eager attention keeps all scores" in note for note in short.notes)
    model = make()
    plain = predict(model, plan, Workload(1, 16))
    cast = predict(model, plan, Workload(1, 16, autocast=True))
    numbers = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert cast.activations - plain.activations == pytest.approx(2 * numbers, rel=0.35)  # type: ignore[operator]


# --- what layers say of themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("presets", "options"),
    [
        ((), {}),
        (("lora",), {"r": 8}),
        (("lora-fa",), {"r": 8, "dropout": 0.1}),
        (("dora",), {"r": 8}),
        (("adalora",), {"r": 8}),
        (("melora",), {"r": 8}),
        (("multilora",), {"r": 8}),
        (("qlora",), {"r": 8}),
    ],
)
def test_formulas_of_words_are_what_the_layers_say(k: int, presets: tuple[str, ...], options: dict[str, Any]) -> None:
    box = nn.ModuleDict({str(i): linear(512, 256, False, bf16) for i in range(k)})
    layers = tuple(Layer(256) for _ in range(k))
    if presets:
        plan = planned(box, *presets, **options)
        storage = NF4() if plan.packed else None
        layers = tuple(Layer(256, placed=p, storage=storage) for p in plan.placed)
    said, asked = by_words(layers, 512, 16384, bf16), held(layers, 512, 16384, bf16, bf16)
    assert said is not None
    assert (said.input, said.outputs) == (asked.input, asked.outputs)
    assert said.extra == pytest.approx(asked.extra, rel=0.02, abs=100)
    assert said.takes == pytest.approx(asked.takes, rel=0.06)


def test_words_without_a_formula_are_asked() -> None:
    box = nn.Sequential(linear(64, 64))
    layers = tuple(Layer(64, placed=p) for p in planned(box, "glora", r=4).placed)
    assert by_words(layers, 64, 32, torch.float32) is None
    assert held(layers, 64, 32, torch.float32, torch.float32).takes > 0


# --- shapes without Transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    theirs = make(family, tie_word_embeddings=tied, attention_bias=True)
    settings = theirs.config.to_dict()
    ours = skeleton(settings, torch.float32)
    assert ours is not None

    def shapes(model: Any) -> dict[str, Any]:
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    assert shapes(ours) == shapes(theirs)
    assert sum(b.numel() for b in ours.buffers()) == sum(
        b.numel() for b in theirs.buffers() if b.is_floating_point() and b.dim()
    )
    assert str(planned(ours, "lora", r=4)) == str(planned(theirs, "lora", r=4))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "hidden_size": 8},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "gemma", **SIZES, "final_logit_softcapping": 30.0},
        {},
        None,
    ],
)
def test_what_no_formula_knows_has_none(config: Any) -> None:
    assert architecture(config) is None
    if config is not None:
        assert skeleton(config, torch.float32) is None


# --- published peaks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if not c.why], ids=lambda case: case.name)
def test_published_peaks_are_met_within_a_tenth(case: Any) -> None:
    assert abs(case.error) < 0.1


def test_the_median_error_is_below_a_twentieth_and_exceptions_are_few() -> None:
    assert statistics.median(abs(case.error) for case in CASES) < 0.05
    assert sum(bool(case.why) for case in CASES) == 1


def test_conventions_differ_as_they_should() -> None:
    plain = Convention(r=16)
    at = {c: peak(LLAMA_3_1_8B, c, 2048) for c in (plain, Convention(r=16, bits=4.127), Convention(r=16, dropout=True))}
    first, packed, dropped = at.values()
    assert first - packed == pytest.approx(6_979_321_856 * (16 - 4.127) / 8, rel=1e-6)
    assert dropped > 1.2 * first
    assert peak(LLAMA_3_1_8B, dataclasses.replace(plain, checkpointing=True), 2048) < 0.8 * first


# --- room -------------------------------------------------------------------------------------------------------


def test_a_gpu_needs_more_than_its_tensors() -> None:
    model = make()
    memory = predict(model, planned(model, "lora", r=8), Workload(2, 64))
    found = need(memory, 100)
    assert found.tensors == memory.total + 100 * 256
    assert found.overhead == int(CONTEXT + 0.05 * memory.moving)
    assert found.room(8) == 8 * GB - found.total > 0 > found.room(1.4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        Workload(0, -2, labelled=1.5)
    assert str(caught.value) == (
        "the memory of this training cannot be predicted:\n"
        "  - batch: 0 is not a positive number\n"
        "  - length: -2 is not a positive number\n"
        "  - labelled: 1.5 is no share of the tokens"
    )


# --- at once ----------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_are_answered_for_in_a_second() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    settings = {"model_type": "llama", "vocab_size": 32000, **sizes}
    start = time.process_time()
    model = skeleton(settings, bf16)
    assert model is not None
    found = predict(model, planned(model, "qlora", r=64), Workload(1, 512, bf16, checkpointing=True), "paged_adamw")
    assert time.process_time() - start < 1
    packed = 6_476_005_376 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert found.weights == pytest.approx(packed + 2 * (2 * 32000 * 4096 + 65 * 4096), rel=1e-4)
    assert found.total < 6e9
