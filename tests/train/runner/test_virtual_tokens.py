"""Prefix and prompt tuning from a configuration to a generated text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import lorary
from lorary.cli import app
from lorary.errors import ConfigError, DataError, MethodError
from lorary.serve.forms.form import serving_form
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from tests.train.runs import VOCABULARY, base_folder, changed, configuration
from tests.train.small import tokenizer

TEXT = "the answer is two"
METHODS: dict[str, dict[str, Any]] = {
    "prefix-tuning": {"tokens": 3, "mlp": 8},
    "prompt-tuning": {"tokens": 6, "init_text": TEXT},
}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base_folder(tmp_path / "base"), tmp_path / "data.jsonl")


def with_method(words: dict[str, Any], name: str, **options: Any) -> dict[str, Any]:
    method = {"name": name, "options": METHODS[name] | options}
    return changed(words | {"method": method}, "training", lr=1e-2, gradient_checkpointing=True)


@pytest.mark.parametrize("name", METHODS)
def test_trained_resumed_evaluated_and_generated(words: dict[str, Any], name: str, tmp_path: Path) -> None:
    tree = with_method(words, name)
    done = run(from_dict(tree), quiet=True)
    assert done.steps == 6
    adapter = tmp_path / "out" / "adapter"
    files = {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}
    for late in ("adapter", "checkpoint-6", "checkpoints/checkpoint-6"):  # as a kill after step 4 leaves it
        shutil.rmtree(tmp_path / "out" / late, ignore_errors=True)
    run(from_dict(tree), quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")} == files
    for command in (["eval", "base", "out", "--data", "data.jsonl"], ["generate", "out", "hello world"]):
        ran = CliRunner().invoke(app(), command)
        assert ran.exit_code == 0, ran.output
    plain = CliRunner().invoke(app(), ["generate", "base", "hello world"])
    assert plain.output != ran.output


def test_a_prompt_starts_at_its_text(words: dict[str, Any]) -> None:
    plan = prepare(from_dict(with_method(words, "prompt-tuning"))).plan
    ids = AutoTokenizer.from_pretrained("base")(TEXT, add_special_tokens=False)["input_ids"]
    assert plan.method.join.ids == tuple(ids)  # type: ignore[union-attr]
    assert {p.method for p in plan.sites} == {plan.method}
    assert "takes 6 positions before the text: of 2,048 positions, 2,042 are left for the text" in plan.notes
    run(from_dict(with_method(words, "prompt-tuning") | {"training": words["training"] | {"lr": 1e-30}}), quiet=True)
    table = load_file("base/model.safetensors")["model.embed_tokens.weight"].float()
    found = load_file("out/adapter/adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(found, table[(ids * 6)[:6]])


def test_the_text_can_be_said_on_the_command_line(words: dict[str, Any]) -> None:
    Path("run.yaml").write_text(json.dumps(words | {"method": {"name": "prompt-tuning"}}))
    told = ["plan", "run.yaml", "--set", f"method.options.init_text={TEXT}", "--set", "method.options.tokens=5"]
    ran = CliRunner().invoke(app(), told)
    assert ran.exit_code == 0, ran.output
    assert "P[5x32]" in ran.output
    assert "takes 5 positions before the text" in ran.output


def test_the_exported_prefix_has_no_network(words: dict[str, Any]) -> None:
    run(from_dict(with_method(words, "prefix-tuning")), quiet=True)
    ran = CliRunner().invoke(app(), ["export", "out", "peft", "--to", "peft", "--base", "base"])
    assert ran.exit_code == 0, ran.output
    assert load_file("peft/adapter_model.safetensors")["prompt_embeddings"].shape == (3, 2 * 2 * 16)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "prefix-tuning", "r": 4}, "method.r: `r`: prefix-tuning sets NoUpdate(), which has no rank"),
        ({"name": "prompt-tuning", "dropout": 0.1}, "Prompt adds no update whose input dropout could act on"),
        (
            {"name": "prompt-tuning", "options": {"token": 5}},
            "method.options.token: `token` is not an option of any method\n      hint: did you mean `tokens`?",
        ),
        (
            {"name": "prompt-tuning", "options": {"init_text": 5}},
            "method.options.init_text: `init_text` is 5; it takes a text",
        ),
        ({"name": "prefix-tuning", "options": {"tokens": "ten"}}, "Prefix has tokens = 'ten'"),
    ],
)
def test_bad_methods(words: dict[str, Any], method: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, MethodError)) as refused:
        from_dict(words | {"method": method})
    assert said in str(refused.value)
    assert not Path("out").exists()


def test_rows_that_do_not_fit_beside_a_prefix(words: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    tree = with_method(words | {"model": str(tmp_path / "gpt2")}, "prefix-tuning", tokens=20)
    with pytest.raises(DataError, match="4 of 24 positions are left for the text") as refused:
        prepare(from_dict(tree))
    assert "set data.max_length: 4" in str(refused.value)


@pytest.mark.parametrize("name", ["prefix-tuning", "prompt-tuning"])
def test_the_serving_engine_refuses_it(name: str, tmp_path: Path) -> None:
    from tests import tiny

    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method(name, tokens=4)))
    with pytest.raises(MethodError) as refused:
        serving_form(lorary.Adapter.of(model), tiny.seeded("LlamaForCausalLM"))
    assert "context: 4 keys and values stand before the text, and a batch cannot add them to some rows only" in str(
        refused.value
    )
    assert "lorary generate, chat and eval compute it" in str(refused.value)
