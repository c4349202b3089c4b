"""Plans: what is printed, ranks and alphas by pattern, what trains in full, notes, and refusals in full."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers
from lorary.methods.lora import ConstantScale
from lorary.model.plan import human_bytes
from tests import tiny


def refused(model: nn.Module, *arguments: Any, **options: Any) -> str:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, *arguments, **options)
    return str(refusal.value)


# --- printed ---------------------------------------------------------------------------------------------------------

_PRINTED = """\
Method
  delta    LowRank(r=2)
  init     Kaiming()
  scale    AlphaOverRank(alpha=4) -> s = 2
  join     Add()
  trains   {A, B}

site                                    kind    out x in  tensors          s  trains
------------------------------------------------------------------------------------
model.layers.{0-1}.self_attn.q_proj x2  linear  16x16     A[2x16] B[16x2]  2  128
model.layers.{0-1}.self_attn.k_proj x2  linear  8x16      A[2x16] B[8x2]   2  96
model.layers.{0-1}.self_attn.v_proj x2  linear  8x16      A[2x16] B[8x2]   2  96
model.layers.{0-1}.self_attn.o_proj x2  linear  16x16     A[2x16] B[16x2]  2  128
model.layers.{0-1}.mlp.gate_proj x2     linear  24x16     A[2x16] B[24x2]  2  160
model.layers.{0-1}.mlp.up_proj x2       linear  24x16     A[2x16] B[24x2]  2  160
model.layers.{0-1}.mlp.down_proj x2     linear  16x24     A[2x24] B[16x2]  2  160

trains    928 of 5,200 parameters (17.8462%)
memory    base 20.3 KiB, adapters 3.6 KiB, gradients and AdamW 10.9 KiB; activations come on top"""


def test_printed() -> None:
    assert str(lorary.plan(tiny.llama(), lorary.method(r=2, alpha=4))) == _PRINTED


def test_printed_with_ranks_full_parameters_and_notes() -> None:
    model = tiny.model("BertForSequenceClassification", num_hidden_layers=1)
    plan = lorary.plan(
        model,
        lorary.method("lora", "bitfit", r=2, alpha=4),
        ["query", "value", "intermediate.dense"],
        ranks={"value": 9, "*": 1},
        alphas={"intermediate.dense": 3},
    )
    assert str(plan).splitlines()[8:] == [
        "site                                       kind    out x in  tensors          s         trains",
        "----------------------------------------------------------------------------------------------",
        "bert.encoder.layer.0.attention.self.query  linear  16x16     A[1x16] B[16x1]  4         32",
        "bert.encoder.layer.0.attention.self.value  linear  16x16     A[9x16] B[16x9]  0.444444  288",
        "bert.encoder.layer.0.intermediate.dense    linear  24x16     A[1x16] B[24x1]  3         40",
        "",
        "base parameter, in full                               trains",
        "------------------------------------------------------------",
        "bert.embeddings.LayerNorm.bias                        16",
        "bert.encoder.layer.0.attention.self.query.bias        16",
        "bert.encoder.layer.0.attention.self.key.bias          16",
        "bert.encoder.layer.0.attention.self.value.bias        16",
        "bert.encoder.layer.0.attention.output.dense.bias      16",
        "bert.encoder.layer.0.attention.output.LayerNorm.bias  16",
        "bert.encoder.layer.0.intermediate.dense.bias          24",
        "bert.encoder.layer.0.output.dense.bias                16",
        "bert.encoder.layer.0.output.LayerNorm.bias            16",
        "bert.pooler.dense.bias                                16",
        "classifier.weight                                     32",
        "classifier.bias                                       2",
        "",
        "trains    562 of 11,162 parameters (5.0349%)",
        "memory    base 43.6 KiB, adapters 1.4 KiB, gradients and AdamW 6.6 KiB; activations come on top",
        "note      the factors are larger than the weight itself at bert.encoder.layer.0.attention.self.value: "
        "a lower rank loses nothing",
        "note      the new head trains in full: classifier.weight",
    ]


def test_a_fused_site_shows_its_parts() -> None:
    text = str(lorary.plan(tiny.model("GPT2LMHeadModel"), lorary.method(r=2, alpha=4), "attention-qv"))
    assert "transformer.h.{0-1}.attn.c_attn[q,v] x2  transposed  48x16     A[4x16] B[32x2]  2  256" in text


def test_long_lists_of_full_parameters_are_cut() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(26):
                setattr(self, f"{chr(97 + i)}", nn.Parameter(torch.zeros(3)))

    assert str(lorary.plan(Wide(), lorary.method("full"))).splitlines()[-5:-3] == [
        "t                        3",
        "... and 6 more",
    ]


def test_a_plan_on_the_meta_device_is_the_plan() -> None:
    method = lorary.method("rslora", r=3)
    here, there = (lorary.plan(tiny.llama(device=d), method) for d in ("cpu", "meta"))
    assert here == there
    assert str(here) == str(there)
    assert hash(here) == hash(there)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_planning_touches_nothing(name: str) -> None:
    model = tiny.llama()
    before, flags = tiny.frozen_copy(model), [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    lorary.plan(model, lorary.method(name))
    assert tiny.same(tiny.frozen_copy(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not adapted_layers(model)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**44, "16384.0 GiB")],
)
def test_sizes_for_people(n: int, text: str) -> None:
    assert human_bytes(n) == text


def test_bytes() -> None:
    plan = lorary.plan(tiny.llama().to(torch.bfloat16), lorary.method("lora-fa", r=2, full="norm"))
    assert plan.base_bytes == 2 * plan.total
    assert plan.adapter_bytes == 4 * sum(math.prod(s) for p in plan.sites for s in p.shapes.values())
    B = sum(p.trainable for p in plan.sites)
    assert plan.training_bytes == 12 * B + 3 * 2 * 16
    assert plan.trainable == B + 16
    assert plan.share == plan.trainable / plan.total


def test_a_tied_parameter_counts_once() -> None:
    tied, untied = (lorary.plan(tiny.llama(tie_word_embeddings=t), lorary.method(r=1)) for t in (True, False))
    assert untied.total - tied.total == 40 * 16
    assert untied.base_bytes - tied.base_bytes == 4 * 40 * 16
    everything = lorary.plan(tiny.llama(tie_word_embeddings=True), lorary.method("full"))
    assert everything.trainable == everything.total == tied.total


# --- ranks and alphas ------------------------------------------------------------------------------------------------


def sizes(plan: lorary.Plan) -> dict[str, tuple[int, float | None]]:
    return {p.site.name.removeprefix("model.layers."): (p.r, p.alpha) for p in plan.sites}


def test_the_first_pattern_that_matches_wins() -> None:
    model = tiny.llama()
    plan = lorary.plan(
        model,
        lorary.method(r=4, alpha=8),
        ["q_proj", "v_proj"],
        ranks={"layers.0.self_attn.q_proj": 1, "q_proj": 2, "*.1.*": 3},
        alphas={"*.1.*": 5, "v_proj": 6.5},
    )
    assert sizes(plan) == {
        "0.self_attn.q_proj": (1, 8),
        "0.self_attn.v_proj": (4, 6.5),
        "1.self_attn.q_proj": (2, 5),
        "1.self_attn.v_proj": (3, 5),
    }
    assert [p.scale for p in plan.sites] == [8, 6.5 / 4, 2.5, 5 / 3]


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({"ranks": {"q_porj": 3}}, "ranks: `q_porj` matches no adapted site\n      hint: did you mean `q_proj`?"),
        ({"ranks": {"*.zzz": 3}}, "ranks: `*.zzz` matches no adapted site"),
        ({"alphas": {"k_proj": 3}}, "alphas: `k_proj` matches no adapted site\n      hint: did you mean `q_proj`?"),
        (
            {"ranks": {"q_proj": 0}},
            "model.layers.0.self_attn.q_proj: LowRank has r = 0; it takes a whole number of at least 1",
        ),
        (
            {"ranks": {"*": 2.0}},
            "model.layers.0.self_attn.q_proj: LowRank has r = 2.0; it takes a whole number of at least 1",
        ),
        (
            {"alphas": {"*": -1}},
            "model.layers.0.self_attn.q_proj: AlphaOverRank has alpha = -1; it takes a positive finite number",
        ),
    ],
)
def test_patterns_that_cannot_be_obeyed(options: dict[str, Any], problems: str) -> None:
    model = tiny.llama(num_hidden_layers=1)
    assert refused(model, lorary.method(), "q_proj", **options) == f"invalid plan:\n  - {problems}"


def test_a_scale_without_an_alpha() -> None:
    method = lorary.method("lora", scale=ConstantScale(0.5))
    assert lorary.plan(tiny.llama(), method, "q_proj").sites[0].alpha is None
    message = refused(tiny.llama(), method, "q_proj", alphas={"q_proj": 3})
    assert message == "invalid plan:\n  - alphas: ConstantScale(s=0.5) has no alpha\n      hint: leave them out"


def test_every_problem_is_told_at_once() -> None:
    message = refused(
        tiny.llama(),
        lorary.method("lora", full=("nrom", "bias")),
        ["q_porj", "v_proj"],
        ranks={"k_proj": 3},
        alphas={"v_proj": 0},
        exclude="zzz",
    )
    heads = [line[4:].partition(":")[0] for line in message.splitlines() if line.startswith("  - ")]
    assert heads == [
        "exclude",
        "targets",
        "ranks",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "full",
        "full",
    ]


@pytest.mark.parametrize("name", ["bitfit", "full"])
def test_what_is_said_of_adapted_layers_is_no_use_without_them(name: str) -> None:
    message = refused(tiny.model("BertModel"), lorary.method(name), ranks={"query": 2}, alphas={"x": 1}, exclude="key")
    assert message == (
        "invalid plan:\n"
        "  - ranks: has no effect: this method adapts no layer\n"
        "  - alphas: has no effect: this method adapts no layer\n"
        "  - exclude: has no effect: this method adapts no layer"
    )


# --- base parameters in full -----------------------------------------------------------------------------------------


def full(model: nn.Module, *patterns: str, targets: Any = "q_proj") -> list[str]:
    return [f.name for f in lorary.plan(model, lorary.method("lora", full=patterns), targets).full]


def test_patterns_over_parameters() -> None:
    model = tiny.llama()
    assert full(model, "model.norm.weight") == ["model.norm.weight"]
    assert full(model, "norm.weight") == ["model.norm.weight"]  # whole components
    assert full(model, "*norm*") == [n for n, _ in model.named_parameters() if "norm" in n]
    assert full(model, "embed_tokens.weight", "lm_head.weight") == ["model.embed_tokens.weight", "lm_head.weight"]


def test_a_module_stands_for_its_parameters() -> None:
    assert full(tiny.llama(), "norm") == ["model.norm.weight"]
    assert full(tiny.llama(), "layers.0.mlp") == [f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")]


def test_a_tied_parameter_by_each_of_its_names() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    assert full(model, "lm_head.weight") == full(model, "embed_tokens.weight") == ["model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("patterns", "problems"),
    [
        (
            ("norm.wieght",),
            "full: `norm.wieght` matches no parameter\n"
            "      hint: did you mean `norm.weight` or `model.norm.weight` or `o_proj.weight`?",
        ),
        (
            ("q_proj.weight",),
            "model.layers.0.self_attn.q_proj.weight: is adapted and would train in full as well: "
            "the adapter would be redundant\n      hint: exclude the site, or narrow `full`",
        ),
        (
            ("bias",),
            "full: this model has no biases to train (Llama-like models have none)\n      hint: use another method",
        ),
    ],
)
def test_full_parameters_that_cannot_be(patterns: tuple[str, ...], problems: str) -> None:
    model = tiny.llama(num_hidden_layers=1)
    method = lorary.method("lora", full=patterns)
    assert refused(model, method, "q_proj") == f"invalid plan:\n  - {problems}"


def test_a_weight_that_is_adapted_under_another_name_is_refused_in_full() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    message = refused(model, lorary.method("lora", full="embed_tokens.weight"), "lm_head")
    assert "model.embed_tokens.weight: is adapted and would train in full as well" in message


def test_the_bias_of_an_adapted_layer_may_train() -> None:
    model = tiny.model("Qwen2ForCausalLM")
    assert len(full(model, "q_proj.bias")) == 2


def test_what_is_no_number_with_a_fraction_cannot_train() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("steps", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
    assert refused(model, lorary.method("full")) == (
        "invalid plan:\n  - steps: is torch.int64 and cannot train in full"
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("BertForSequenceClassification", ["classifier.weight", "classifier.bias"]),
        (
            "DistilBertForSequenceClassification",
            ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"],
        ),
        ("GPT2ForSequenceClassification", ["score.weight"]),
        ("LlamaForTokenClassification", ["score.weight", "score.bias"]),
        ("BertForQuestionAnswering", ["qa_outputs.weight", "qa_outputs.bias"]),
        ("ViTForImageClassification", ["classifier.weight", "classifier.bias"]),
        ("BertForMaskedLM", []),
        ("LlamaForCausalLM", []),
        ("BertModel", []),
    ],
)
def test_a_new_head_trains(name: str, head: list[str]) -> None:
    plan = lorary.plan(tiny.model(name, "meta", pad_token_id=0), lorary.method(r=1))
    assert [f.name for f in plan.full] == head
    notes = [note for note in plan.notes if "new head" in note]
    assert notes == ([f"the new head trains in full: {', '.join(head)}"] if head else [])


# --- notes -----------------------------------------------------------------------------------------------------------


def notes(model: nn.Module, *targets: str, r: int = 1) -> tuple[str, ...]:
    return lorary.plan(model, lorary.method(r=r), list(targets)).notes


def test_factors_larger_than_the_weight() -> None:
    site = "model.layers.{0-1}.self_attn.k_proj"
    assert notes(tiny.llama(), "q_proj", "k_proj", r=6) == (
        f"the factors are larger than the weight itself at {site}: a lower rank loses nothing",
    )
    assert notes(tiny.llama(), "k_proj", r=5) == ()


def test_tied_weights() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    assert notes(model, "embedding") == (
        "model.embed_tokens shares its weight with lm_head.weight: the adapter acts on model.embed_tokens alone, "
        "and merging gives it a weight of its own",
    )
    assert notes(model, "lm_head") == (
        "lm_head shares its weight with model.embed_tokens.weight: the adapter acts on lm_head alone, "
        "and merging gives it a weight of its own",
    )
    assert notes(tiny.llama(), "embedding", "lm_head") == ()


def test_a_layer_used_twice_is_no_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.ReLU())
    model.append(model[0])
    assert notes(model, "0") == ()


def test_what_no_target_reaches() -> None:
    model = tiny.model("DbrxForCausalLM", "meta")  # flat experts of a class that is not known
    experts = [f"transformer.blocks.{{0-1}}.ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")]
    assert notes(model, "all-linear") == (f"no adapter reaches {', '.join(experts)} (51% of the model)",)
    assert notes(model, "Wqkv") == ()  # nobody asked for all
    assert notes(tiny.model("MixtralForCausalLM", "meta"), "all-linear") == ()
    assert notes(tiny.llama(), "all-linear") == ()


# --- models that nothing can be planned for --------------------------------------------------------------------------


def test_an_adapted_model_is_refused() -> None:
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, lorary.method(r=1)))
    for part in (model, model.model, model.model.layers[0]):
        assert refused(part, lorary.method()) == (
            "cannot plan for this model:\n  - model: has adapters attached\n      hint: detach them first"
        )


def test_a_single_layer_is_refused() -> None:
    assert refused(nn.Linear(2, 2), lorary.method()) == (
        "cannot plan for this model:\n"
        "  - model: is a single Linear\n"
        "      hint: put it into a module: nn.Sequential(layer)"
    )


def test_a_model_that_has_seen_nothing_is_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    assert refused(model, lorary.method()) == (
        "cannot plan for this model:\n"
        "  - 0.weight: has no shape before the model has seen its first input\n      hint: run the model once\n"
        "  - 0.bias: has no shape before the model has seen its first input\n      hint: run the model once"
    )
    model(torch.zeros(1, 2))
    assert len(lorary.plan(model, lorary.method(r=1)).sites) == 2


def test_a_factor_that_starts_at_zero_cannot_be_frozen() -> None:
    message = "{} starts at zero in a layer of kind {} and is frozen: nothing could train"
    hint = "\n      hint: exclude it, or use another init"
    assert refused(tiny.llama(), lorary.method("lora-fa"), "embedding") == (
        f"invalid plan:\n  - model.embed_tokens: {message.format('{A}', 'embedding')}{hint}"
    )
    frozen_b = lorary.method("lora", frozen="B")
    assert refused(tiny.ConvNet(), frozen_b, "head") == (
        f"invalid plan:\n  - head: {message.format('{B}', 'linear')}{hint}"
    )
    assert lorary.plan(tiny.llama(), frozen_b, "embedding").trainable == 16 * 40


# --- plans made elsewhere --------------------------------------------------------------------------------------------


def test_a_plan_made_on_the_meta_device_fits_the_real_model() -> None:
    plan = lorary.plan(tiny.llama(device="meta"), lorary.method(r=2, full="norm"))
    model = tiny.llama()
    expected = tiny.logits(model)
    lorary.attach(model, plan)
    assert torch.equal(tiny.logits(model), expected)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable


def test_a_plan_made_for_another_model_is_refused_with_every_difference() -> None:
    plan = lorary.plan(tiny.llama(device="meta"), lorary.method(r=2, full="norm"), ["q_proj", "lm_head"])
    other = tiny.llama(num_hidden_layers=1, hidden_size=8, head_dim=4, vocab_size=44)
    del other.lm_head
    other.lm_head = nn.LayerNorm(8)
    before = copy.deepcopy(dict(other.named_parameters()))
    with pytest.raises(PlanError) as refusal:
        lorary.attach(other, plan)
    assert str(refusal.value) == (
        "the plan does not fit this model:\n"
        "  - model.layers.0.self_attn.q_proj: has 8 input features, expected 16\n"
        "  - model.layers.1.self_attn.q_proj: the model has no such module\n"
        "  - lm_head: is of class LayerNorm, expected a layer of kind linear\n"
        "  - model.norm.weight: is (8,), expected (16,)"
    )
    assert not adapted_layers(other)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in other.named_parameters())


def test_another_kind_of_layer_with_the_same_numbers_is_refused() -> None:
    plan = lorary.plan(nn.Sequential(nn.Conv2d(4, 6, (3, 1))), lorary.method(r=1), "0")
    for layer, what in [
        (nn.Linear(12, 6), "is linear, expected conv2d"),
        (nn.Conv2d(4, 6, (1, 3)), "has a kernel of (1, 3), expected (3, 1)"),
        (nn.Conv2d(8, 6, (3, 1), groups=2), "has 2 groups, expected 1"),
        (nn.Conv2d(4, 9, (3, 1)), "has 9 output features, expected 6"),
    ]:
        with pytest.raises(PlanError) as refusal:
            lorary.attach(nn.Sequential(layer), plan)
        assert str(refusal.value) == f"the plan does not fit this model:\n  - 0: {what}"


def test_gpt_2s_layer_is_a_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    plan = lorary.plan(nn.Sequential(Conv1D(6, 4)), lorary.method(r=1), "0")
    model = lorary.attach(nn.Sequential(nn.Linear(4, 6)), plan)
    assert model(torch.zeros(1, 4)).shape == (1, 6)


# --- words that attaching does not obey yet --------------------------------------------------------------------------


def test_a_storage_that_finds_nothing_to_quantise_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    assert refused(model, lorary.method("qlora", r=2), targets="conv") == (
        "invalid plan:\n  - storage: NF4 finds no plain linear layer to quantise besides the output head"
    )


def test_what_is_quantised_is_in_the_plan() -> None:
    model = tiny.llama()
    plan = lorary.plan(model, lorary.method("qlora", r=2), targets=["q_proj", "embed_tokens"])
    assert len(plan.quantized) == 14  # adapted or not
    assert not any("lm_head" in name or "embed" in name for name in plan.quantized)
    numbers = [model.get_parameter(f"{name}.weight").numel() for name in plan.quantized]
    blocks = [-(-n // 64) for n in numbers]
    quantised = sum(n // 2 + b + 4 * -(-b // 256) + 4 for n, b in zip(numbers, blocks, strict=True))
    assert plan.base_bytes == sum(p.numel() * 4 for p in model.parameters()) - 4 * sum(numbers) + quantised
    text = str(plan)
    assert "NF4 quantises 14 layers" in text
    assert "model.embed_tokens stays dense: NF4 quantises linear layers that are not tied" in text
    assert plan.total == sum(p.numel() for p in model.parameters())
    lorary.attach(model, plan)
    held = lorary.detach(model)
    again = lorary.plan(held, lorary.method("qlora", r=2))
    assert again.quantized == ()
    assert (again.total, again.base_bytes) == (plan.total, plan.base_bytes)


def test_words_of_every_other_axis_are_obeyed() -> None:
    every = [
        ("dora",),
        ("pissa",),
        ("olora", "dora"),
        ("vera",),
        ("melora",),
        ("multilora",),
        ("delta-lora",),
        ("o-lora",),
    ]
    for names in every:
        plan = lorary.plan(tiny.llama(), lorary.method(*names, r=2))
        assert len(plan.sites) == 14


# --- while training ---------------------------------------------------------------------------------------------------


def test_a_rank_below_the_budgets_target_is_refused_at_its_site() -> None:
    assert refused(tiny.llama(), lorary.method("adalora", r=4, target=2), "q_proj", ranks={"*.1.*": 1}) == (
        "invalid plan:\n  - model.layers.1.self_attn.q_proj: a target of 2 is more than the 1 directions of the start"
    )
    plan = lorary.plan(tiny.llama(), lorary.method("adalora", r=4, target=2), "q_proj", ranks={"*.1.*": 6})
    assert [p.r for p in plan.sites] == [4, 6]


def test_parts_of_a_fused_weight_have_no_spectrum_each() -> None:
    method = lorary.method("adalora", r=4, target=2)
    why = "its projections cannot have separate spectra: adapt the fused weight as a whole"
    sites = "".join(f"\n  - transformer.h.{i}.attn.c_attn: {why}" for i in range(2))
    assert refused(tiny.model("GPT2LMHeadModel"), method, "c_attn[q,v]") == f"invalid plan:{sites}"
    assert len(lorary.plan(tiny.model("GPT2LMHeadModel"), method, "c_attn").sites) == 2


def test_written_weights_are_in_the_plan_and_train_in_no_optimizer() -> None:
    plan = lorary.plan(tiny.llama(), lorary.method("delta-lora", r=2, mode="paper", full="norm"), "q_proj")
    assert {f.name: f.trains for f in plan.full} == {
        "model.layers.0.self_attn.q_proj.weight": False,
        "model.layers.1.self_attn.q_proj.weight": False,
        "model.norm.weight": True,
    }
    assert plan.trainable == 2 * 2 * (16 + 16) + 16
    both = lorary.method("delta-lora", r=2, mode="paper", full="q_proj")
    assert "is adapted and would train in full as well" in refused(tiny.llama(), both, "q_proj")


def test_layers_that_share_are_printed_and_counted_as_one() -> None:
    plan = lorary.plan(tiny.llama(), lorary.method(r=2, alpha=4.0), "q_proj")
    shared = dataclasses.replace(plan, sites=tuple(dataclasses.replace(p, share="q_proj") for p in plan.sites))
    assert shared.trainable == plan.trainable / 2 == 64
    assert shared.adapter_bytes == plan.adapter_bytes / 2
    row = next(line for line in str(shared).splitlines() if "q_proj" in line)
    expected = "model.layers.{0-1}.self_attn.q_proj x2 share one linear 16x16 A[2x16] B[16x2] 2 64"
    assert " ".join(row.split()) == expected


def test_a_past_can_be_planned_for_on_the_meta_device() -> None:
    first = tiny.trained(tiny.seeded("LlamaForCausalLM"), lorary.method("o-lora", r=2), "q_proj")
    adapter = lorary.Adapter.of(first)
    meta = tiny.model("LlamaForCausalLM", device="meta")
    plan = lorary.plan(meta, lorary.method("o-lora", r=3), "q_proj", after=[adapter])
    assert {p.delta.past for p in plan.sites} == {(2,)}
    model = lorary.attach(tiny.seeded("LlamaForCausalLM"), plan)
    assert torch.allclose(tiny.logits(model), tiny.logits(first), atol=1e-5)


def test_a_past_that_is_no_list_or_holds_no_numbers() -> None:
    """An iterator would be used up by the checks, and the tasks in it would be lost."""
    model, method = tiny.model("LlamaForCausalLM"), lorary.method("o-lora", r=2)
    adapter = lorary.Adapter.of(tiny.trained(tiny.model("LlamaForCausalLM"), lorary.method("lora", r=2), "q_proj"))
    for after, name in [(iter([adapter]), "list_iterator"), (adapter, "Adapter"), ("first", "str"), (None, "NoneType")]:
        assert refused(model, method, "q_proj", after=after) == (
            f"invalid plan:\n  - after: is a {name}, not a list of adapters\n"
            "      hint: after=[lorary.load_adapter(path), ...]"
        )
    next(iter(adapter.tensors.values()))["A"][0, 0] = math.nan
    told = refused(tiny.model("LlamaForCausalLM"), method, "q_proj", after=[adapter])
    assert "after[0]: holds NaN or infinite numbers" in told
