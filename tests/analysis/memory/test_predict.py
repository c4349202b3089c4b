"""A step of few blocks, extrapolated, is a step of all blocks; the skeleton is Transformers' own model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.published import CASES, LLAMA_3_1_8B, Convention, peak
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorary
from lorary.analysis.memory import predict as prediction
from lorary.analysis.memory.gpu_fit import CONTEXT, GB, gpu_requirement
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.shorten import blocks, without_values
from lorary.analysis.memory.workload import Workload
from lorary.errors import PlanError
from lorary.model.loading.skeleton import FAMILIES, skeleton

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 300}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
GPT2 = {"n_embd": 64, "n_layer": 8, "n_head": 4, "vocab_size": 300}
bf16 = torch.bfloat16


def make(family: str = "llama", **changes: Any) -> Any:
    changes |= {"sliding_window": None} if family == "mistral" else {}
    changes |= {"decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    config = AutoConfig.for_model(family, **((GPT2 if family == "gpt2" else SIZES) | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def planned(model: nn.Module, *presets: str, targets: Any = "all-linear", **options: Any) -> lorary.Plan:
    return lorary.plan(model, lorary.method(*presets, **options), targets)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of every step that is simulated."""
    sizes: list[int] = []

    def count(model: Any, plan: Any, inputs: Any, work: Any) -> Any:
        sizes.append(model.config.num_hidden_layers)
        return simulate(model, plan, inputs, work)

    simulate = prediction.simulate
    monkeypatch.setattr(prediction, "simulate", count)
    return sizes


# --- extrapolation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "presets", "options", "changes"),
    [
        ("llama", ("lora",), {"r": 8}, {"dtype": bf16}),
        ("llama", ("lora",), {"r": 8}, {"padding": True}),
        ("llama", ("lora",), {"r": 8, "dropout": 0.1}, {"checkpointing": True}),
        ("llama", ("lora",), {"r": 8}, {"autocast": True}),
        ("llama", ("lora",), {"r": 8}, {"autocast": True, "checkpointing": True}),
        ("llama", ("qlora", "dora"), {"r": 8}, {"checkpointing": True}),
        ("llama", ("vera",), {"r": 16}, {}),
        ("llama", ("adalora",), {"r": 8}, {}),
        ("llama", ("delta-lora",), {"r": 8}, {}),
        ("llama", ("longlora",), {"r": 8, "length": 4096}, {"padding": True}),
        ("llama", ("full",), {}, {}),
        ("gpt2", ("lora",), {"r": 8}, {}),
        ("gemma3_text", ("lora",), {"r": 8}, {"dtype": bf16, "checkpointing": True}),
        ("lfm2", ("lora",), {"r": 8}, {"dtype": bf16}),  # convolutions and attention
        ("qwen3_moe", ("lora",), {"r": 8}, {"dtype": bf16}),  # experts in every other block
        ("qwen3_moe", ("qlora",), {"r": 8}, {"dtype": bf16}),
    ],
)
def test_few_blocks_say_what_all_of_them_hold(
    family: str, presets: tuple[str, ...], options: dict[str, Any], changes: dict[str, Any], simulated: list[int]
) -> None:
    model = make(family)
    plan = planned(model, *presets, **options)
    work = Workload(4, 128, **changes)
    found = predict(model, plan, work)
    assert found.activations
    assert max(simulated) < 8
    assert found == predict(model, plan, work, whole=True)
    assert simulated[-1] == 8


def test_blocks_are_of_one_kind_where_they_hold_the_same() -> None:
    model = make(
        "gemma3_text", layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"] * 2
    )
    found = blocks(model, planned(model, "lora", r=8))
    assert found is not None
    assert sorted(found.counts.values()) == [1, 3, 4]  # the first one, windows, full attention
    assert found.samples()[None] == (0, 5, 7)
    assert sorted(found.samples().values()) == [(0, 4, 5, 7), (0, 5, 6, 7), (0, 5, 7)]


@pytest.mark.parametrize("adapted", [[6], [3, 4, 5, 6], [0, 7]])
def test_blocks_without_adapters_are_a_kind_of_their_own(adapted: list[int], simulated: list[int]) -> None:
    model = make()
    plan = planned(model, "lora", r=8, targets=[f"model.layers.{i}.mlp.*_proj" for i in adapted])
    found = predict(model, plan, Workload(4, 128))
    assert found == predict(model, plan, Workload(4, 128), whole=True)
    assert max(simulated[:-1]) < 8


def test_ranks_of_their_own_make_kinds_and_too_many_kinds_are_simulated_as_they_are(simulated: list[int]) -> None:
    model = make()
    plan = planned(model, "lora", r=8)

    def ranked(ranks: list[int]) -> lorary.Plan:
        methods = [lorary.method("lora", r=r) for r in ranks]
        placed = [dataclasses.replace(p, method=methods[int(p.site.name.split(".")[2])]) for p in plan.sites]
        return dataclasses.replace(plan, sites=tuple(placed))

    for ranks in ([4, 4, 4, 8, 8, 8, 8, 8], [1, 2, 3, 4, 5, 6, 7, 8]):
        several = ranked(ranks)
        assert predict(model, several, Workload(4, 128)) == predict(model, several, Workload(4, 128), whole=True)
    assert simulated == [3, 4, 4, 8, 8, 8]


def test_the_comparison_can_fail() -> None:
    model = make()
    plan = planned(model, "lora", r=8)
    found = predict(model, plan, Workload(4, 128))
    assert predict(model, plan, Workload(4, 160)).moving > 1.1 * found.moving
    assert predict(model, planned(model, "lora", r=8, targets="mlp"), Workload(4, 128)).moving < 0.95 * found.moving
    deep = make(num_hidden_layers=16)
    assert predict(deep, planned(deep, "lora", r=8), Workload(4, 128)).moving > 1.8 * found.moving


def test_the_short_model_is_a_copy() -> None:
    model = make("gemma3_text")
    kinds = list(model.config.layer_types)
    twin, plan = without_values(model, planned(model, "lora", r=8), bf16, ("model.layers", (0, 5, 7)))
    short: Any = twin
    assert len(model.model.layers) == model.config.num_hidden_layers == 8
    assert model.config.layer_types == kinds
    assert short.config.layer_types == [kinds[0], kinds[5], kinds[7]]
    assert {p.site.name.split(".")[2] for p in plan.sites} == {"0", "1", "2"}
    assert {t.dtype for t in short.parameters()} == {bf16}


class _Unnumbered(nn.Module):
    """A model whose configuration does not say how many blocks it has."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x).relu()
        return (x,)


def test_without_a_number_of_blocks_all_of_them_are_simulated() -> None:
    model = _Unnumbered()
    plan = planned(model, "lora", r=2)
    assert blocks(model, plan) is None
    found = predict(model, plan, Workload(2, 16))
    assert found.activations == predict(model, plan, Workload(2, 16), whole=True).activations


def test_a_block_that_is_used_twice_is_not_taken_for_two() -> None:
    model = make()
    model.model.layers[5] = model.model.layers[2]
    plan = planned(model, "lora", r=8)
    assert blocks(model, plan) is None
    found = predict(model, plan, Workload(2, 16))
    assert found.activations == predict(model, plan, Workload(2, 16), whole=True).activations


def test_attention_with_narrower_values_is_predicted() -> None:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    model = make("deepseek_v3", head_dim=8, num_key_value_heads=4, first_k_dense_replace=3, **ranks, **experts)
    plan = planned(model, "lora", r=8)
    found = predict(model, plan, Workload(2, 16, bf16))
    assert found.activations
    assert found == predict(model, plan, Workload(2, 16, bf16), whole=True)


def test_eager_attention_keeps_scores_and_autocast_copies_of_the_weights() -> None:
    model = make(_attn_implementation="eager")
    plan = planned(model, "lora", r=8)
    short, long = (predict(model, plan, Workload(2, length)) for length in (128, 512))
    assert long.activations > 6 * short.activations  # type: ignore[operator]
    assert any("eager attention keeps all scores" in note for note in short.notes)
    model = make()
    plain = predict(model, plan, Workload(1, 2))
    cast = predict(model, plan, Workload(1, 2, autocast=True))
    numbers = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    numbers += plan.trainable  # of so few tokens the adapters keep casts of their factors, too
    assert cast.activations - plain.activations == pytest.approx(2 * numbers, rel=0.1)  # type: ignore[operator]


# --- shapes without Transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    theirs = make(family, tie_word_embeddings=tied, attention_bias=True)
    ours = skeleton(theirs.config.to_dict(), torch.float32)
    assert ours is not None

    def shapes(model: Any) -> dict[str, Any]:
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    assert shapes(ours) == shapes(theirs)
    assert sum(b.numel() for b in ours.buffers()) == sum(
        b.numel() for b in theirs.buffers() if b.is_floating_point() and b.dim()
    )
    assert str(planned(ours, "lora", r=4)) == str(planned(theirs, "lora", r=4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("presets", "options", "changes"),
    [
        (("lora",), {"r": 8}, {"dtype": bf16}),
        (("lora",), {"r": 8}, {"dtype": bf16, "padding": True}),
        (("lora-fa",), {"r": 8}, {"autocast": True}),
        (("qlora", "dora"), {"r": 8}, {"checkpointing": True}),
        (("full",), {}, {}),
    ],
)
def test_a_step_of_the_skeleton_holds_what_transformers_does(
    family: str, presets: tuple[str, ...], options: dict[str, Any], changes: dict[str, Any]
) -> None:
    theirs: Any = make(family)
    ours: Any = skeleton(theirs.config.to_dict(), torch.float32)
    found, wanted = (
        predict(model, planned(model, *presets, **options), Workload(4, 128, **changes)) for model in (ours, theirs)
    )
    positions = 8 * 128 if changes.get("checkpointing") else 0  # an argument of every block of theirs
    assert found == dataclasses.replace(wanted, activations=wanted.activations - positions)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", **SIZES},
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "mistral", **SIZES},  # its window is 4,096 tokens where nothing is said
        {"model_type": "llama", **SIZES, "attention_dropout": 0.1},
        {"model_type": "llama", **SIZES, "_attn_implementation": "eager"},
        {},
    ],
)
def test_other_models_are_left_to_transformers(config: dict[str, Any]) -> None:
    assert skeleton({"model_type": "llama", **SIZES}, torch.float32) is not None
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


# --- fit -------------------------------------------------------------------------------------------------------


def test_a_gpu_needs_more_than_its_tensors() -> None:
    model = make()
    memory = predict(model, planned(model, "lora", r=8), Workload(2, 64))
    found = gpu_requirement(memory, 100)
    assert found.tensors == memory.total + 100 * 256
    assert found.overhead == int(CONTEXT + 0.05 * memory.moving)
    assert found.free_bytes(8) == 8 * GB - found.total > 0 > found.free_bytes(1.4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        Workload(0, -2, labelled=1.5)
    assert str(caught.value) == (
        "cannot predict the memory of this training:\n"
        "  - Workload has batch = 0; it takes a whole number of at least 1\n"
        "  - Workload has length = -2; it takes a whole number of at least 1\n"
        "  - Workload has labelled = 1.5; it takes a number above 0 and at most 1"
    )


# --- time -------------------------------------------------------------------------------------------------------


def test_seven_billion_parameters_are_answered_for_in_seconds() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    settings = {"model_type": "llama", "vocab_size": 32000, **sizes}
    start = time.process_time()
    model = skeleton(settings, bf16)
    assert model is not None
    found = predict(model, planned(model, "qlora", r=64), Workload(1, 512, bf16, checkpointing=True), "paged_adamw")
    assert time.process_time() - start < 3
    packed = 6_476_005_376 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert found.weights == pytest.approx(packed + 2 * (2 * 32000 * 4096 + 65 * 4096), rel=1e-4)
    assert found.total < 6e9
