"""LongLoRA: what trains, what a model becomes, and how it is kept, merged, given to PEFT and taken off again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError, MethodError, PlanError
from lorary.layers.rope import PositionsWarning
from lorary.methods.longlora import LongContext

from .. import tiny

KNOWN, LENGTH = 8, 32


def base(**changes: Any) -> Any:
    """A model that knows eight positions."""
    return tiny.seeded("LlamaForCausalLM", max_position_embeddings=KNOWN, **changes)


def ids() -> Tensor:
    return torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    return tiny.logits(model, input_ids=ids())


def longlora(*names: str, **options: Any) -> lorary.Method:
    return lorary.method("longlora", *names, **{"length": LENGTH, "r": 2, "alpha": 4} | options)


def trained(model: Any, *names: str, **options: Any) -> Any:
    lorary.attach(model, lorary.plan(model, longlora(*names, **options)))
    return tiny.shaken(model, 0.1)


# --- what trains ------------------------------------------------------------------------------------------------------


def test_counts_on_llama_2_7b() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    plan = lorary.plan(model, lorary.method("longlora", length=32768, r=8, alpha=16))
    assert sum(p.trainable for p in plan.sites) == 8_388_608
    assert {p.site.name.rpartition(".")[2] for p in plan.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    sizes = {f.name: f.size for f in plan.full}
    assert sizes["model.embed_tokens.weight"] == 131_072_000
    assert sum(n for name, n in sizes.items() if "norm" in name) == 266_240
    assert plan.trainable == sum(p.trainable for p in plan.sites) + sum(sizes.values()) == 139_726_848
    assert f"{plan.share:.2%}" == "2.07%"
    assert plan.method.context == LongContext(32768, factor=8.0, known=4096)
    assert "lm_head.weight" not in sizes


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("GPTNeoXForCausalLM", {}, {"embed_in", "input_layernorm", "post_attention_layernorm", "final_layer_norm"}),
        ("Qwen3ForCausalLM", {}, {"embed_tokens", "q_norm", "k_norm", "norm"}),
        ("PhiForCausalLM", {}, {"embed_tokens", "final_layernorm"}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, {"embed_tokens", "norm"}),
        ("OlmoForCausalLM", {}, {"embed_tokens"}),  # whose norms have no weights
    ],
)
def test_embeddings_and_norms_by_what_they_are(name: str, changes: dict[str, Any], expected: set[str]) -> None:
    plan = lorary.plan(tiny.model(name, **changes), longlora())
    found = {f.name.split(".")[-2] for f in plan.full}
    assert expected <= found
    assert all("norm" in last or "embed" in last for last in found)


def test_targets_are_the_papers_unless_others_are_said() -> None:
    model = base()
    assert len(lorary.plan(model, longlora()).sites) == 2 * 4
    assert len(lorary.plan(model, longlora(), "all-linear").sites) == 2 * 7
    assert len(lorary.plan(model, lorary.method("lora", r=2)).sites) == 2 * 7


# --- what the model becomes -------------------------------------------------------------------------------------------


def test_at_step_0_it_is_the_base_with_divided_positions() -> None:
    model = base()
    expected = type(model)(copy.deepcopy(model.config))
    expected.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    stretched = type(model)(expected.config).eval()
    stretched.load_state_dict(model.state_dict())
    lorary.attach(model, lorary.plan(model, longlora()))
    assert torch.equal(logits(model), logits(stretched))
    assert model.config.rope_parameters == expected.config.rope_parameters


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic"])
def test_detached_and_disabled_it_is_the_base_again(rope: str) -> None:
    model = base()
    before, values, plain, config = (
        tiny.everything(model),
        tiny.frozen_copy(model),
        logits(model),
        model.config.to_dict(),
    )
    trained(model, rope=rope).train()
    long = logits(model.eval())
    assert not torch.equal(long, plain)
    model.train()
    with lorary.disabled(model), lorary.disabled(model):
        assert torch.equal(logits(model), plain), "in training, too: nothing of the method is left"
    assert torch.equal(logits(model.eval()), long)
    lorary.detach(model)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("rope", ["linear", "yarn", "dynamic"])
def test_merged_it_is_a_plain_model_whose_configuration_says_the_factor(rope: str, tmp_path: Path) -> None:
    model = trained(base(), rope=rope)
    expected = logits(model)
    lorary.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model.train()), logits(model.eval())), "nothing of the training is left"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["factor"] == 4.0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert lorary.plan(again, longlora(rope=rope)).method.context.factor == 1, "it reads as far already"


def test_unmerged_it_goes_on_training_in_groups() -> None:
    model = trained(base()).train()
    groups, full = logits(model), logits(model.eval())
    lorary.merge(model.train(), keep=True)
    assert torch.allclose(logits(model), full, atol=1e-4), "merged it attends in full"
    lorary.unmerge(model)
    assert torch.equal(logits(model), groups)
    lorary.detach(model)
    assert torch.equal(logits(model.eval()), logits(base()))


def test_a_length_that_the_base_reads_changes_no_position() -> None:
    model = base()
    plain = logits(model)
    plan = lorary.plan(model, longlora(length=KNOWN))
    assert plan.method.context.factor == 1
    assert f"the base reads {KNOWN} tokens: for {KNOWN} its positions stay as they are" in plan.notes
    lorary.attach(model, plan)
    assert torch.equal(logits(model), plain)
    assert not torch.equal(logits(model.train()), plain)


# --- how it is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("rslora",), ("dora",), ("lora+",), ("pissa",), ("vera",), ("qlora", "dora")])
def test_saved_and_loaded_it_has_equal_logits(names: tuple[str, ...], tmp_path: Path) -> None:
    options = {"alpha": None} if "vera" in names else {}
    model = base(hidden_size=64, intermediate_size=64)
    method = longlora(*names, **options) if not options else lorary.method("longlora", *names, length=LENGTH, r=2)
    lorary.attach(model, lorary.plan(model, method))
    tiny.shaken(model, 0.1)
    lorary.save(model, tmp_path)
    other = lorary.load(base(hidden_size=64, intermediate_size=64), tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert other.config.rope_parameters["factor"] == 4.0
    assert json.loads((tmp_path / "lorary.json").read_text())["method"]["context"] == {
        "component": "LongContext",
        "length": LENGTH,
        "rope": "linear",
        "shifted": True,
        "groups": 4,
        "factor": 4.0,
        "known": KNOWN,
    }
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT would read it over positions that are not divided"


def test_a_base_that_needs_another_factor_is_refused(tmp_path: Path) -> None:
    lorary.save(trained(base()), tmp_path)
    other = base()
    other.config.max_position_embeddings = 16
    before = tiny.everything(other)
    with pytest.raises(FileError) as refusal:
        lorary.load(other, tmp_path)
    assert "context: divides positions by 4; for 32 tokens this model needs 2" in str(refusal.value)
    assert tiny.everything(other) == before


def test_adapters_switch_with_their_positions() -> None:
    short, long = (lorary.Adapter.of(trained(base(), length=n)) for n in (16, 32))
    lora = lorary.Adapter.of(tiny.trained(base(), lorary.method("lora", r=2)))
    alone = [logits(lorary.switch(base(), a)) for a in (short, long, lora)]
    model = base()
    for i in (0, 1, 2, 1, 0, 2):
        lorary.switch(model, [short, long, lora][i])
        assert torch.equal(logits(model), alone[i])
    lorary.switch(model, None)
    assert torch.equal(logits(model), logits(base()))
    lorary.switch(model, long)
    with pytest.raises(MethodError) as refusal:
        lorary.switch(model, [long, lora])
    assert "context: they use different RoPE scaling or attention, or act on other parts of a text: " in str(
        refusal.value
    )
    assert torch.equal(logits(model), alone[1]), "the model is as it was"
    both = logits(lorary.switch(model, [long, long]))
    assert not torch.equal(both, alone[1])
    assert model.config.rope_parameters["factor"] == 4.0


def test_peft_reads_the_export_over_a_base_that_is_loaded_as_its_readme_says(tmp_path: Path) -> None:
    model = trained(base())
    expected = logits(model)
    adapter = lorary.Adapter.of(model)
    lorary.detach(model)
    with pytest.warns(PositionsWarning, match="'rope_type': 'linear', 'factor': 4.0"):
        export_peft(adapter, tmp_path / "peft", model=model)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "model.embed_tokens" in config["modules_to_save"]
    assert sum("norm" in name for name in config["modules_to_save"]) == 5
    model.save_pretrained(tmp_path / "base")
    code = (tmp_path / "peft" / "BASE.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("'the base'", repr(str(tmp_path / "base")))
    found: dict[str, Any] = {}
    exec(code.replace('"this folder"', repr(str(tmp_path / "peft"))), found)
    assert isinstance(found["model"], peft.PeftModel)
    torch.testing.assert_close(logits(found["model"].eval()), expected, rtol=1e-5, atol=1e-5)


def test_a_factor_of_one_is_a_peft_adapter_as_it_is(tmp_path: Path) -> None:
    model = trained(base(), length=KNOWN)
    lorary.save(model, tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_length_has_to_be_said() -> None:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(base(), lorary.method("longlora"))
    assert str(refusal.value) == (
        "invalid plan:\n"
        "  - context: the context length is missing\n"
        "      hint: set length=32768, or another number of tokens"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "LongContext has length = 0; it takes a whole number of at least 1, or None"),
        ({"length": "32k"}, "LongContext has length = '32k'; it takes a whole number of at least 1, or None"),
        ({"length": 1.5}, "LongContext has length = 1.5; it takes a whole number of at least 1, or None"),
        ({"length": True}, "LongContext has length = True; it takes a whole number of at least 1, or None"),
        ({"rope": "ntk"}, "LongContext has rope = 'ntk'; it takes linear or yarn or dynamic"),
        ({"groups": 0}, "LongContext has groups = 0; it takes a whole number of at least 1"),
        ({"shifted": 1}, "LongContext has shifted = 1; it takes true or false"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as refusal:
        longlora(**options)
    assert f"context: {message}" in str(refusal.value)


def test_a_model_without_rotary_positions() -> None:
    with pytest.raises(PlanError, match="context: GPT2LMHeadModel has no rotary position embeddings to scale"):
        lorary.plan(tiny.model("GPT2LMHeadModel"), longlora())


def test_more_groups_than_tokens() -> None:
    with pytest.raises(PlanError, match="context: divides 32 tokens into 33 groups\n      hint: set groups=4"):
        lorary.plan(base(), longlora(groups=33))


def test_a_file_that_does_not_say_the_factor(tmp_path: Path) -> None:
    lorary.save(trained(base()), tmp_path)
    record = json.loads((tmp_path / "lorary.json").read_text())
    del record["method"]["context"]["factor"]
    (tmp_path / "lorary.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match="context: the RoPE scaling factor is missing"):
        lorary.load(base(), tmp_path)


@pytest.mark.parametrize("rope", ["yarn", "dynamic"])
def test_a_base_of_another_length_where_that_enters_the_angles(rope: str, tmp_path: Path) -> None:
    lorary.save(trained(base(), length=31, rope=rope), tmp_path)
    other = tiny.seeded("LlamaForCausalLM", max_position_embeddings=10)
    with pytest.raises(FileError, match="context: is for a model of 8 positions; this one has 10"):
        lorary.load(other, tmp_path)


# --- other models -----------------------------------------------------------------------------------------------------


def test_a_model_that_was_made_of_the_same_configuration_stays_as_it_is() -> None:
    model = base()
    other = transformers.LlamaForCausalLM(model.config).eval()
    before = logits(other)
    trained(model).train()
    assert torch.equal(logits(other), before)
    trained(other)
    assert other.config.rope_parameters["factor"] == LENGTH / KNOWN
    lorary.detach(model)
    assert other.config.rope_parameters["factor"] == LENGTH / KNOWN


def test_a_pickled_model_works_in_a_process_that_has_not_attached_any(tmp_path: Path) -> None:
    model = trained(base()).train()
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); "
        "print(model(input_ids=torch.arange(3, 35)[None]).logits.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(model(input_ids=torch.arange(3, 35)[None]).logits.sum().item(), abs=1e-3)
