"""Heads and other modules in full: `head` and `full` of `lorary.plan`, trained, saved, loaded, exported to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lorary
from lorary.adapters import export_peft, load_adapter
from lorary.errors import FileError, LoraryError, PlanError

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(2, 40, (4, 7), generator=torch.Generator().manual_seed(0))
USUAL = ["query", "value", "classifier.dense", "classifier.out_proj"]  # RoBERTa's targets in PEFT's examples
HEAD = [f"classifier.{layer}.{name}" for layer in ("dense", "out_proj") for name in ("weight", "bias")]


def roberta(seed: int = 0) -> Any:
    """The same encoder for every seed, and another head."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=20, num_labels=3)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
    return model


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()


def planned(model: nn.Module, targets: Any = None, method: str = "lora", **options: Any) -> lorary.Plan:
    rank = {} if method == "bitfit" else {"r": 2}
    return lorary.plan(model, lorary.method(method, **rank), targets, **options)


def trained(model: Any, plan: lorary.Plan, steps: int = 3) -> Any:
    """The model after some steps with the plan."""
    lorary.attach(model, plan, seed=1)
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=0.1))
    classes = {"labels": torch.tensor([0, 1, 2, 1])} if hasattr(model, "classifier") else {"labels": IDS}
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, **classes).loss.backward()
        optimizer.step()
    return model


def test_the_usual_targets_of_roberta_adapt_its_head() -> None:
    plan = planned(roberta(), USUAL)
    assert [p.site.name for p in plan.sites[-2:]] == ["classifier.dense", "classifier.out_proj"]
    assert {f.name: f.trains for f in plan.full} == {name: name.endswith("bias") for name in HEAD}
    assert "the new head trains in full: classifier.dense.bias, classifier.out_proj.bias" in plan.notes
    assert (
        "the new head's weights under adapters are saved with them: classifier.dense.weight, classifier.out_proj.weight"
        in plan.notes
    )


@pytest.mark.parametrize(
    ("head", "sites", "full"),
    [
        (None, 0, dict.fromkeys(HEAD, True)),
        ("full", 0, dict.fromkeys(HEAD, True)),
        ("frozen", 0, {}),
        ("lora", 2, {name: name.endswith("bias") for name in HEAD}),
    ],
)
def test_a_head_trains_as_it_is_said(head: str | None, sites: int, full: dict[str, bool]) -> None:
    plan = planned(roberta(), ["query"], head=head)
    assert sum("classifier" in p.site.name for p in plan.sites) == sites
    assert {f.name: f.trains for f in plan.full} == full


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "rslora"])
@pytest.mark.parametrize("options", [{"head": "lora"}, {"head": "full"}, {"targets": USUAL}], ids=str)
def test_an_adapter_holds_a_new_head_however_it_trains(options: dict[str, Any], method: str, tmp_path: Path) -> None:
    """The next base has other random weights in its head: the adapter's replace them, also the ones under LoRA."""
    plan = planned(roberta(), method=method, **({"targets": ["query", "value"]} | options))
    model = trained(roberta(), plan)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    lorary.save(model, tmp_path / "adapter")
    other = lorary.load(roberta(seed=7), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, expected)
        lorary.merge(other, keep=True)
        torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    lorary.unmerge(other)
    lorary.detach(other)
    before = roberta(seed=7).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_frozen_head_belongs_to_the_base(tmp_path: Path) -> None:
    model = trained(roberta(), planned(roberta(), ["query"], head="frozen"))
    lorary.save(model, tmp_path / "adapter")
    with pytest.raises(FileError, match="other weights"):
        lorary.load(roberta(seed=7), tmp_path / "adapter")
    lorary.load(roberta(), tmp_path / "adapter")


def test_modules_in_full_become_pefts_modules_to_save(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plan = planned(llama(), ["q_proj"], full=["lm_head", "norms"])
    assert {f.name for f in plan.full} >= {"lm_head.weight", "model.norm.weight"}
    model = trained(llama(), plan)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    lorary.save(model, tmp_path / "adapter")
    base = lorary.detach(model)
    export_peft(load_adapter(tmp_path / "adapter", model=base), tmp_path / "peft", model=base)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    assert "lm_head" in theirs.peft_config["default"].modules_to_save
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lorary.load(llama(), tmp_path / "adapter")(input_ids=IDS).logits, expected)


def test_presets_leave_modules_in_full_out() -> None:
    plan = planned(llama(), full=["layers.0.mlp", "embed_tokens"])
    assert not [p for p in plan.sites if "layers.0.mlp" in p.site.name]
    assert len(plan.sites) == 11
    assert "model.layers.0.mlp.gate_proj.weight" in {f.name for f in plan.full}


def test_tied_weights_train_at_both_ends_and_it_is_said() -> None:
    plan = planned(llama(tied=True), full=["lm_head"])
    assert [f.name for f in plan.full] == ["model.embed_tokens.weight"]
    assert "lm_head.weight is model.embed_tokens.weight, tied: both train" in plan.notes


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (roberta, {"head": "froze"}, "head: 'froze' is not a way to train a head\n      hint: did you mean `frozen`?"),
        (roberta, {"head": 3}, "head: 3 is not a way to train a head\n      hint: known: full, frozen, lora"),
        (
            roberta,
            {"head": "frozen", "full": "out_proj"},
            "is to be frozen, and `full` trains classifier.out_proj.bias",
        ),
        (roberta, {"head": "lora", "method": "bitfit"}, "`lora` adapts the head, and this method adapts no layer"),
        (roberta, {"full": 3}, "full: 3 is not a pattern over parameter names"),
        (roberta, {"full": [{}]}, "full: "),
        (roberta, {"full": "*"}, "every base weight trains in full, so LowRank would be redundant"),
        (roberta, {"full": "nosuch"}, "full: `nosuch` matches no parameter"),
        (roberta, {"targets": USUAL, "head": "full"}, "hint: leave it out of `targets`"),
        (roberta, {"head": "lora", "method": "pissa"}, "whose random weight the adapter holds, and this init changes"),
        (
            llama,
            {"targets": "embedding", "full": "embeddings"},
            "every layer of `embedding` trains in full, and none is adapted",
        ),
        (llama, {"targets": ["q_proj"], "full": ["q_proj"]}, "is adapted and would train in full as well"),
        (
            lambda: llama(tied=True),
            {"head": "full"},
            "head: the head of LlamaForCausalLM is the weight of model.embed_tokens: both would train\n"
            '      hint: say so with full=["model.embed_tokens"], or use head: lora',
        ),
        (
            lambda: BertModel(BertConfig(**SIZES)),
            {"head": "full"},
            "head: a BertModel has no output head\n      hint: leave it out",
        ),
    ],
)
def test_what_cannot_be_said_of_a_head(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        planned(model(), **options)
    assert message in str(error.value)
    assert isinstance(error.value, LoraryError)


# --- several methods with heads, layers and parameters in full --------------------------------------------------------


def test_several_methods_share_what_narrows_and_what_trains_in_full() -> None:
    model = lorary.builtin.load_model()
    methods = {"attention": lorary.method("lora", r=4), "mlp": lorary.method("dora", r=2)}
    plan = lorary.plan(model, methods, layers="0-1", full=["norms"], head="lora", exclude="*.v_proj")
    by_block = {p.site.name: type(p.method.join).__name__ for p in plan.sites}
    assert {name.split(".")[2] for name in by_block if "layers" in name} == {"0", "1"}
    assert not any("v_proj" in name for name in by_block)
    assert {join for name, join in by_block.items() if "mlp" in name} == {"MagnitudeDirection"}
    assert {join for name, join in by_block.items() if "attn" in name or name == "lm_head"} == {"Add"}
    assert plan.full
    assert all("norm" in parameter.name for parameter in plan.full)


BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"exclude": "nothing_here"}, "exclude: `nothing_here` matches no layer"),
    ({"layers": "9-99"}, "layers: `9-99` is not in `model.layers`, which has the layers 0 to 5"),
    ({"full": ["re:("]}, "full: `re:(`: not a regular expression: missing ), unterminated subpattern"),
    ({"full": ["re:("], "ranks": {"re:)": 2}}, "ranks: `re:)`: not a regular expression: unbalanced parenthesis"),
    ({"exclude": "*.mlp.*"}, "exclude: excludes every layer that the targets name"),
]


@pytest.mark.parametrize(("more", "sentence"), BAD_PLANS, ids=[sentence[:30] for _, sentence in BAD_PLANS])
def test_a_mistake_that_several_methods_share_is_said_once(more: dict[str, Any], sentence: str) -> None:
    methods = {"attention": lorary.method("lora", r=4), "mlp": lorary.method("dora", r=2)}
    with pytest.raises(lorary.PlanError) as caught:
        lorary.plan(lorary.builtin.load_model(), methods, **more)
    assert str(caught.value).count(sentence) == 1


def test_a_first_method_that_adapts_no_layer_is_refused_beside_another() -> None:
    methods = {"all-linear": lorary.method("bitfit"), "mlp": lorary.method("lora")}
    with pytest.raises(lorary.PlanError, match="for 'all-linear' adapts no layers: it trains base parameters"):
        lorary.plan(lorary.builtin.load_model(), methods)
