"""Bottleneck adapters: two narrow networks in each block, which cannot be merged, and trained normalisations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.export.merged import export_merged
from lorary.analysis.merge_check import MergeCheck
from lorary.cli.merge import merge as merge_command
from lorary.errors import FileError, LoraryError, MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.serve.forms.form import serving_form

from .. import tiny

WHY = "Bottleneck transforms the layer's output by a non-linear network, which no weight and bias can"
KEEP = "      hint: keep it attached: the base with the adapter computes it"


def attached(model: Any, *presets: str, seed: int = 0, **options: Any) -> Any:
    """The model with bottleneck adapters at step 0."""
    method = lorary.method("houlsby", *presets, **({"m": 3} | options))
    return lorary.attach(model, lorary.plan(model, method), seed=seed)


def trained(model: Any, *presets: str, **options: Any) -> Any:
    """As after training."""
    attached(model, *presets, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def bert_large() -> Any:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig(**sizes))


def test_counts_of_bert_large() -> None:
    """2 L (2 m d + d + m) numbers in the adapters, and the scales and shifts of all normalisations."""
    L, d, m = 24, 1024, 64
    plan = lorary.plan(bert_large(), lorary.method("houlsby"))
    adapters, norms = sum(p.trainable for p in plan.sites), sum(f.size for f in plan.full)
    assert adapters == 2 * L * (2 * m * d + d + m) == 6_343_680
    assert norms == (2 * L + 1) * 2 * d == 100_352
    assert plan.trainable == adapters + norms
    pfeiffer = lorary.plan(bert_large(), lorary.method("houlsby", position="feed-forward", norms=False))
    assert pfeiffer.trainable == adapters // 2
    assert {p.site.name.split(".", 3)[-1] for p in plan.sites} == {"attention.output.dense", "output.dense"}
    assert {p.site.name.split(".", 3)[-1] for p in pfeiffer.sites} == {"output.dense"}


def test_the_start() -> None:
    """A normal distribution of deviation 1e-3, cut at two deviations; biases of zero; a function of the seed."""
    one, same, other = (attached(tiny.seeded("BertModel"), m=64, seed=seed) for seed in (0, 0, 1))
    drawn = []
    for a, b, c in zip(*(adapted_layers(m).values() for m in (one, same, other)), strict=True):
        for role in ("W1", "W2"):
            W = a.params[role]
            assert torch.equal(W, b.params[role])
            assert not torch.equal(W, c.params[role])
            assert W.abs().max() <= 2e-3
            drawn.append(W.detach().flatten())
        assert not a.params["b1"].any()
        assert not a.params["b2"].any()
        assert not torch.equal(a.params["W1"], a.params["W2"].T)
    numbers = torch.cat(drawn)
    assert abs(numbers.mean()) < 5e-5
    assert numbers.std() == pytest.approx(0.88e-3, rel=0.05)  # of the normal distribution within two deviations
    firsts = [layer.params["W1"] for layer in adapted_layers(one).values()]
    assert not torch.equal(firsts[0], firsts[1]), "every layer has a draw of its own"


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_it_starts_near_the_base(name: str) -> None:
    model = tiny.seeded(name)
    plain = tiny.logits(model)
    gap = (tiny.logits(attached(model, m=64)) - plain).abs().max()
    assert 0 < gap <= 1e-4


@pytest.mark.parametrize(
    ("activation", "phi"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_the_equation(activation: str, phi: Any) -> None:
    layer = nn.Linear(6, 5)
    model = nn.ModuleDict({"o_proj": layer})
    lorary.attach(
        model, lorary.plan(model, lorary.method("houlsby", m=3, activation=activation, norms=False), "o_proj")
    )
    params = model.o_proj.params
    with torch.no_grad():
        for p in params.values():
            p.copy_(torch.randn_like(p))
    x = torch.randn(2, 4, 6)
    h = layer(x)
    expected = h + phi(h @ params["W1"].T + params["b1"]) @ params["W2"].T + params["b2"]
    torch.testing.assert_close(model.o_proj(x), expected)


def test_it_stands_before_the_residual_sum() -> None:
    """What it adds to a block's output passes the block's normalisation together with the residual."""
    model = tiny.seeded("BertModel")
    block = model.encoder.layer[0].output
    plain, norm = block.dense, block.LayerNorm
    trained(model, norms=False)
    h, residual = torch.randn(2, 24), torch.randn(2, 16)
    p = block.dense.params
    y = plain(h)
    y = y + F.gelu(y @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]
    torch.testing.assert_close(block(h, residual), norm(y + residual))


def test_what_trains() -> None:
    model = tiny.seeded("BertForSequenceClassification")
    attached(model)
    model(tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
    moving = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moving == {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = {re.sub(r".*\.(params\.\w+|LayerNorm\.\w+|classifier\.\w+)$", r"\1", f".{n}") for n in moving}
    assert kinds == {
        *(f"params.{role}" for role in ("W1", "b1", "W2", "b2")),
        "LayerNorm.weight",
        "LayerNorm.bias",
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("presets", [(), ("qlora",)], ids=["plain", "quantised"])
def test_saved_loaded_switched_and_taken_off(presets: tuple[str, ...], tmp_path: Path) -> None:
    model = trained(tiny.seeded("LlamaForCausalLM"), *presets)
    y = tiny.logits(model)
    lorary.save(model, tmp_path / "adapter")
    other = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "adapter")
    assert torch.equal(tiny.logits(other), y)
    adapter = lorary.load_adapter(tmp_path / "adapter")
    assert adapter.method == lorary.method("houlsby", *presets, m=3)
    lorary.switch(other, None)
    base = tiny.seeded("LlamaForCausalLM")
    base = lorary.quantize(base, adapter.method.storage) if presets else base
    assert torch.equal(tiny.logits(other), tiny.logits(base))
    lorary.switch(other, adapter)
    assert torch.equal(tiny.logits(other), y)


def test_the_norms_are_the_adapters_own() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.frozen_copy(model)
    trained(model)
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])
    lorary.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- merging: refused in one sentence everywhere, and nothing is written ---------------------------------------------


def test_no_merge_says_why() -> None:
    model = trained(tiny.seeded("LlamaForCausalLM"))
    before, y = tiny.frozen_copy(model), tiny.logits(model)
    for keep in (True, False):
        with pytest.raises(StateError) as refusal:
            lorary.merge(model, keep=keep)
        where = "model.layers.0.self_attn.o_proj and 3 more"
        assert str(refusal.value) == f"cannot merge:\n  - {where}: {WHY}\n{KEEP}"
    assert torch.equal(tiny.logits(model), y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def by_the_command(model: Any, adapter: lorary.Adapter, folder: Path) -> None:
    """`lorary merge`, which would otherwise load a base first."""
    lorary.save_adapter(adapter, folder.parent / "adapter")
    merge_command(str(folder.parent / "adapter"), folder)


NEEDS_A_WEIGHT: dict[str, Any] = {
    "the weight of one layer": lambda model, adapter, folder: next(iter(adapted_layers(model).values())).merged(),
    "the low-rank form": lambda model, adapter, folder: adapter.low_rank(tiny.seeded("LlamaForCausalLM")),
    "a row of a mixed batch": lambda model, adapter, folder: serving_form(adapter, tiny.seeded("LlamaForCausalLM")),
    "a plain LoRA for PEFT": lambda model, adapter, folder: export_peft(
        adapter, folder, model=tiny.seeded("LlamaForCausalLM")
    ),
    "the command": by_the_command,
    "the merged checkpoint": lambda model, adapter, folder: export_merged(adapter, "no/base", folder),
    "a mixture": lambda model, adapter, folder: lorary.mix(
        [adapter, adapter], base=tiny.seeded("LlamaForCausalLM"), approximate=True
    ),
    "another scale": lambda model, adapter, folder: lorary.scale(adapter, 0.5, base=tiny.seeded("LlamaForCausalLM")),
    "a truncation": lambda model, adapter, folder: lorary.compress(adapter, rank=2),
    "singular values": lambda model, adapter, folder: lorary.inspect_adapter(adapter, tiny.seeded("LlamaForCausalLM")),
    "the rounding error of a merge": lambda model, adapter, folder: MergeCheck.of(model).sites(model, None),
    "the first gradients": lambda model, adapter, folder: lorary.first_gradients(model, lambda: None),
    "an earlier task": lambda model, adapter, folder: lorary.plan(
        tiny.seeded("LlamaForCausalLM"), lorary.method("o-lora", r=2), after=[adapter]
    ),
}


@pytest.mark.parametrize("ask", NEEDS_A_WEIGHT.values(), ids=NEEDS_A_WEIGHT)
def test_whatever_needs_a_weight_is_refused_with_the_reason(ask: Any, tmp_path: Path) -> None:
    model = trained(tiny.seeded("LlamaForCausalLM"))
    with pytest.raises(LoraryError, match=re.escape(WHY)):
        ask(model, lorary.Adapter.of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_rank_can_be_changed() -> None:
    with pytest.raises(MethodError, match="Bottleneck has no rank: its change is not a sum of directions"):
        lorary.change_rank(lorary.Adapter.of(trained(tiny.seeded("LlamaForCausalLM"))), 2)


# --- where it cannot go, and files that are not its own --------------------------------------------------------------

LINEAR = "a bottleneck adapter transforms the output of a linear layer, and this is of kind"
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "an embedding": (
        tiny.llama,
        "embedding",
        {},
        f"model.embed_tokens: {LINEAR} embedding",
    ),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3)),
        "0",
        {},
        f"0: {LINEAR} conv1d",
    ),
    "projections": (
        lambda: tiny.model("GPT2LMHeadModel"),
        "h.0.attn.c_attn[q]",
        {},
        "transformer.h.0.attn.c_attn: a bottleneck adapter transforms the whole output, not single projections",
    ),
    "ranks": (
        tiny.llama,
        None,
        {"ranks": {"o_proj": 4}},
        "ranks: Bottleneck has no rank\n      hint: leave them out",
    ),
    "alphas": (
        tiny.llama,
        None,
        {"alphas": {"o_proj": 4}},
        "alphas: ConstantScale(s=1.0) has no alpha\n      hint: leave them out",
    ),
}


@pytest.mark.parametrize(("make", "targets", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_where_it_cannot_go(make: Any, targets: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(make(), lorary.method("houlsby", norms=False), targets, **options)
    assert str(refusal.value) == f"invalid plan:\n  - {message}"


def test_a_model_without_norms_says_how_to_go_on() -> None:
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(4, 4)})})
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, lorary.method("houlsby", m=2), "down_proj")
    assert "norms" in str(refusal.value)
    assert lorary.plan(model, lorary.method("houlsby", m=2, norms=False), "down_proj").trainable == 2 * 8 + 2 + 4


RECORDS: dict[str, tuple[Any, str]] = {
    "a rank": (
        lambda record: record["sites"][0].update(r=4),
        "lorary.json: model.layers.0.self_attn.o_proj: r: is 4, and Bottleneck has no rank",
    ),
    "an alpha": (
        lambda record: record["sites"][0].update(alpha=4),
        "lorary.json: model.layers.0.self_attn.o_proj: its scale, ConstantScale, has no alpha",
    ),
    "a bottleneck of nothing": (
        lambda record: record["method"]["join"].update(m=0),
        "join: Bottleneck has m = 0; it takes a whole number of at least 1",
    ),
    "another width": (
        lambda record: record["method"]["join"].update(m=2),
        "W1: has the shape [3, 16], expected [2, 16]",
    ),
    "code for an activation": (
        lambda record: record["method"]["join"].update(activation="__import__('os')"),
        "join: Bottleneck has activation = \"__import__('os')\"; it takes gelu or relu or silu or tanh",
    ),
    "another position": (
        lambda record: record["method"]["join"].update(position="../.."),
        "join: Bottleneck has position = '../..'; it takes both or feed-forward",
    ),
    "an unknown field": (
        lambda record: record["method"]["join"].update(depth=3),
        "join: Bottleneck has no field `depth`",
    ),
    "an update beside it": (
        lambda record: record["method"].update(delta={"component": "LowRank", "r": 2}, init={"component": "Kaiming"}),
        "join: Bottleneck adds no update to the weight, so LowRank would have no effect",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), RECORDS.values(), ids=RECORDS)
def test_a_bad_record_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    lorary.save(trained(tiny.seeded("LlamaForCausalLM")), tmp_path)
    record = json.loads((tmp_path / "lorary.json").read_text())
    spoil(record)
    (tmp_path / "lorary.json").write_text(json.dumps(record))
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.frozen_copy(model)
    with pytest.raises(FileError) as refusal:
        lorary.load(model, tmp_path)
    assert message in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
