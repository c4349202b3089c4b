"""Fingerprints: the same base in every state and precision, and no other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.model.fingerprint import Fingerprint, base_name
from tests import tiny


def test_the_same_base_at_another_precision() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    whole = Fingerprint.of(model)
    assert Fingerprint.of(tiny.seeded("LlamaForCausalLM")) == whole
    assert Fingerprint.of(model.to(torch.float64)) == whole
    assert Fingerprint.of(model.to(torch.bfloat16)) == whole
    assert Fingerprint.of(model.to(torch.float32)) == whole


def test_a_checkpoint_in_bfloat16_read_in_float32() -> None:
    low = tiny.seeded("LlamaForCausalLM").to(torch.bfloat16)
    high = copy.deepcopy(low).float()
    assert Fingerprint.of(low) == Fingerprint.of(high)


def test_other_weights() -> None:
    one, other = (Fingerprint.of(tiny.seeded("LlamaForCausalLM", seed=seed)) for seed in (0, 1))
    assert one.structure == other.structure
    assert one.weights != other.weights


@pytest.mark.parametrize("parameter", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_every_parameter_counts(parameter: str) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    before = Fingerprint.of(model)
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1.01)
    assert Fingerprint.of(model).weights != before.weights


def test_swapped_weights_of_the_same_shape() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    before = Fingerprint.of(model)
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight
    assert Fingerprint.of(model).weights != before.weights


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"vocab_size": 41}, {"attention_bias": True}])
def test_another_structure(changes: dict[str, Any]) -> None:
    one, other = Fingerprint.of(tiny.llama()), Fingerprint.of(tiny.llama(**changes))
    assert one.architecture == other.architecture == "LlamaForCausalLM"
    assert one.structure != other.structure


METHODS = [
    (("lora",), ["embedding", "all-linear", "lm_head"]),
    (("lora", "bitfit"), "all-linear"),
    (("bitfit",), "all-linear"),
    (("full",), "all-linear"),
]


@pytest.mark.parametrize(("names", "targets"), METHODS)
@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_what_is_attached_does_not_change_it(name: str, names: tuple[str, ...], targets: Any) -> None:
    if name.startswith("T5") and "bitfit" in names:
        names, targets = ("lora",), "all-linear"  # T5 has no biases
    model = tiny.seeded(name)
    base = Fingerprint.of(model)
    lorary.attach(model, lorary.plan(model, lorary.method(*names), targets))
    assert Fingerprint.of(model) == base
    tiny.shaken(model)
    assert Fingerprint.of(model) == base
    assert Fingerprint.of(model.to(torch.float16)) == base
    with lorary.disabled(model):
        assert Fingerprint.of(model) == base
    lorary.detach(model.float())
    if "full" not in names:  # halved once, values are no longer those of the base
        assert Fingerprint.of(model).structure == base.structure


@pytest.mark.parametrize(("names", "targets"), METHODS)
def test_after_a_detach_it_is_the_bases(names: tuple[str, ...], targets: Any) -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    base = Fingerprint.of(model)
    lorary.attach(model, lorary.plan(model, lorary.method(*names), targets))
    tiny.shaken(model)
    lorary.detach(model)
    assert Fingerprint.of(model) == base


def test_a_merged_model_is_another_base() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    base = Fingerprint.of(model)
    lorary.attach(model, lorary.plan(model, lorary.method()))
    tiny.shaken(model)
    lorary.merge(model)
    assert Fingerprint.of(model).structure == base.structure
    assert Fingerprint.of(model).weights != base.weights


def test_a_tied_model_knows_both_names() -> None:
    tied, untied = (tiny.seeded("LlamaForCausalLM", tie_word_embeddings=tie) for tie in (True, False))
    assert Fingerprint.of(tied).structure == Fingerprint.of(untied).structure
    untied.load_state_dict(tied.state_dict())
    assert Fingerprint.of(tied) == Fingerprint.of(untied)


def test_without_values_there_is_a_structure_only() -> None:
    empty = Fingerprint.of(tiny.llama(device="meta"))
    assert empty.weights == ""
    assert empty.structure == Fingerprint.of(tiny.llama()).structure
    assert empty.disagreements(Fingerprint.of(tiny.llama())) == []


def test_a_model_without_parameters_or_with_empty_ones() -> None:
    assert Fingerprint.of(nn.ReLU()).architecture == "ReLU"
    model = nn.Module()
    model.empty = nn.Parameter(torch.empty(0, 3))
    model.one = nn.Parameter(torch.ones(()))
    model.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    assert Fingerprint.of(model).weights == Fingerprint.of(copy.deepcopy(model)).weights != ""


def test_where_it_came_from(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "my-base")
    loaded = type(tiny.llama()).from_pretrained(tmp_path / "my-base")
    assert Fingerprint.of(loaded).name == "my-base"  # nothing of the path on this machine
    assert Fingerprint.of(tiny.llama()).name == ""


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("/home/me/models/small", "small"),
        ("/home/me/models/small/", "small"),
        ("./small", "small"),
        ("../small", "small"),
        ("~/small", "small"),
        ("C:/small", "small"),
        ("a/b/c", "c"),
        ("C:\\models\\small", "small"),
        ("", ""),
    ],
)
def test_base_name(path: str, name: str) -> None:
    assert base_name(path) == name


def said(**other: str) -> list[str]:
    one = Fingerprint("Llama", "a" * 64, "b" * 64, "org/base")
    fields = {"architecture": "Llama", "structure": "a" * 64, "weights": "b" * 64, "name": "elsewhere"} | other
    return [str(problem) for problem in one.disagreements(Fingerprint(**fields))]


def test_what_is_said_of_differences() -> None:
    assert said() == []  # a name is no difference
    assert said(weights="c" * 64) == [
        "base: other weights: bbbbbbbbbbbb when it was trained, cccccccccccc here (it was trained on `org/base`)"
    ]
    assert said(structure="c" * 64, weights="c" * 64) == [
        "base: other layers or sizes: aaaaaaaaaaaa when it was trained, cccccccccccc here"
    ]
    assert said(architecture="GPT2", structure="c" * 64) == [
        "base: another architecture: Llama when it was trained, GPT2 here",
        "base: other layers or sizes: aaaaaaaaaaaa when it was trained, cccccccccccc here",
    ]
    assert said(architecture="", structure="", weights="") == []  # what is not known is not compared
    assert Fingerprint().disagreements(Fingerprint("Llama", "a" * 64, "b" * 64)) == []


# --- the function of the same weights ---------------------------------------------------------------------------------

SETTINGS = [
    ({"rms_norm_eps": 1e-3}, "`rms_norm_eps`: 1e-06 when it was trained, 0.001 here"),
    ({"hidden_act": "gelu"}, "`hidden_act`: 'silu' when it was trained, 'gelu' here"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "`rope_parameters.rope_theta`: 10000.0 when it was trained, 500000.0 here",
    ),
    ({"num_attention_heads": 2, "num_key_value_heads": 1}, "`head_dim`: 4 when it was trained, 8 here"),
]


@pytest.mark.parametrize(("changes", "said"), SETTINGS)
def test_a_configuration_that_changes_the_function_is_another_base(changes: dict[str, Any], said: str) -> None:
    one, other = (tiny.seeded("LlamaForCausalLM", **c) for c in ({}, changes))
    assert not torch.equal(tiny.logits(one), tiny.logits(other))
    problems = Fingerprint.of(one).disagreements(Fingerprint.of(other))
    assert f"base: another configuration, {said}" in map(str, problems)


def test_a_window_is_a_part_of_the_function() -> None:
    one, other = (Fingerprint.of(tiny.seeded("MistralForCausalLM", sliding_window=n)) for n in (4096, 3))
    assert [str(p) for p in one.disagreements(other)] == [
        "base: another configuration, `sliding_window`: 4096 when it was trained, 3 here"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.3},
        {"use_cache": False},
        {"pad_token_id": 3},
        {"initializer_range": 0.5},
        {"max_position_embeddings": 99},
        {"name_or_path": "elsewhere"},
        {"attn_implementation": "eager"},
    ],
)
def test_a_configuration_that_does_not_change_it_is_the_same_base(changes: dict[str, Any]) -> None:
    one, other = tiny.seeded("LlamaForCausalLM"), tiny.seeded("LlamaForCausalLM", **changes)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(one.model.embed_tokens.weight)  # padding has a zero row
    other.load_state_dict(one.state_dict())
    assert Fingerprint.of(one).disagreements(Fingerprint.of(other)) == []


def test_many_differences_are_cut_short() -> None:
    one, other = (Fingerprint(settings={f"s{i}": value for i in range(9)}) for value in (1, 2))
    problems = one.disagreements(other)
    assert len(problems) == 6
    assert str(problems[-1]) == "base: and 4 more settings"


def test_what_an_older_record_or_version_does_not_know_is_not_compared() -> None:
    new = Fingerprint.of(tiny.seeded("LlamaForCausalLM"))
    old = Fingerprint.from_record({k: v for k, v in new.record().items() if k not in ("settings", "buffers")})
    assert old is not None
    assert (old, old.settings) == (new, {})
    assert old.disagreements(new) == new.disagreements(old) == []
    later = Fingerprint(settings=dict(new.settings) | {"a_new_setting": 3})
    assert later.disagreements(new) == []


@pytest.mark.parametrize("settings", ["x", [], {"a": {"b": 1}}, {"a": [[1]]}])
def test_settings_that_are_none_are_refused(settings: Any) -> None:
    assert Fingerprint.from_record(Fingerprint("Llama").record() | {"settings": settings}) is None


def test_a_record_keeps_everything() -> None:
    import json

    one = Fingerprint.of(tiny.seeded("LlamaForCausalLM"))
    again = Fingerprint.from_record(json.loads(json.dumps(one.record())))
    assert again is not None
    assert again.record() == one.record()
    assert again.disagreements(one) == []


# --- buffers ----------------------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    torch.manual_seed(0)
    return tiny.ConvNet()


def test_running_statistics_are_a_part_of_the_base() -> None:
    one, other = _net(), _net()
    other.norm.running_mean.add_(1)  # type: ignore[union-attr, operator]
    problems = Fingerprint.of(one).disagreements(Fingerprint.of(other))
    assert [problem.what.partition(":")[0] for problem in problems] == ["other buffers, such as running statistics"]
    count = _net()
    count.norm.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
    assert Fingerprint.of(one).disagreements(Fingerprint.of(count)) == []


def test_statistics_that_train_are_not_compared(tmp_path: Path) -> None:
    """The adapter holds them, so whatever the base has in their place is replaced."""
    model = _net()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2).replace(full=("norms",)), ["pointwise"]))
    with torch.no_grad():
        tiny.shaken(model)
        model.norm.running_mean.add_(1)  # type: ignore[union-attr, operator]
    lorary.save(model, tmp_path)
    base = _net()
    base.norm.running_var.mul_(2)  # type: ignore[union-attr, operator]
    lorary.load(base, tmp_path)
    assert torch.equal(base.norm.running_mean, model.norm.running_mean)  # type: ignore[union-attr, arg-type]
