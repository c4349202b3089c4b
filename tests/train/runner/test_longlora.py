"""LongLoRA from its configuration to a merged model: what is trained in groups, read in full, and told on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainerCallback
from typer.testing import CliRunner

import lorary
from lorary.cli import app
from lorary.errors import ConfigError
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from tests import tiny
from tests.train.runs import changed, configuration, dpo, llama
from tests.train.small import tokenizer

KNOWN, LENGTH = 16, 64


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration that extends a model of 16 positions to 64."""
    monkeypatch.chdir(tmp_path)
    small = llama(bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=KNOWN)
    small.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    made = configuration(tmp_path / "base", tmp_path / "data.jsonl")
    texts = [" ".join(["hello world the answer is two"] * (3 + i % 4)) + f" {i}" for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    method = {"name": ["longlora", "rslora"], "r": 2, "alpha": 4, "options": {"length": LENGTH}}
    return changed(made | {"method": method}, "training", lr=1e-2, max_steps=4, save_steps=4, eval_steps=4)


class Watch(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Which attention is in force, step by step, and in every evaluation."""

    def __init__(self) -> None:
        self.training: list[str] = []
        self.evaluating: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.training.append(model.config._attn_implementation)

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.evaluating.append(model.config._attn_implementation)


@pytest.mark.parametrize("packing", [False, True])
def test_from_a_configuration_to_a_merged_model(words: dict[str, Any], packing: bool, tmp_path: Path) -> None:
    watch = Watch()
    done = run(from_dict(changed(words, "data", packing=packing)), quiet=True, callbacks=[watch])
    assert watch.training == ["lorary_shifted_4"] * 4
    assert set(watch.evaluating) == {"sdpa"}
    kept = lorary.load_adapter(done.adapter)
    assert kept.method.context is not None
    assert kept.method.context.length == LENGTH
    assert {p.site.name.rpartition(".")[2] for p in kept.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    moved = lorary.load(transformers.AutoModelForCausalLM.from_pretrained("base"), done.adapter)
    assert moved.config.rope_parameters["factor"] == LENGTH / KNOWN
    plain = dict(transformers.AutoModelForCausalLM.from_pretrained("base").named_parameters())
    assert all(not torch.equal(value, plain[name]) for name, value in kept.full.items())
    runner = CliRunner()
    merged = runner.invoke(app(), ["merge", str(done.folder), "merged", "--dtype", "float32", "--base", "base"])
    assert merged.exit_code == 0, merged.output
    whole = transformers.AutoModelForCausalLM.from_pretrained("merged")
    ids = torch.arange(40)[None] + 5
    expected = tiny.logits(moved, input_ids=ids)
    torch.testing.assert_close(tiny.logits(whole, input_ids=ids), expected, rtol=1e-4, atol=1e-4)
    prompt = " ".join(["hello world the answer is two"] * 4)  # longer than the base knows
    said = runner.invoke(app(), ["generate", "out", prompt, "--base", "base", "--max-new-tokens", "3"])
    assert said.exit_code == 0, said.output


def test_rows_and_positions_that_do_not_fit_are_told(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        prepare(from_dict(changed(words, "data", max_length=LENGTH + 1)))
    assert "rows of up to 65 tokens, but the method extends the context to 64" in str(refusal.value)
    assert "hint: set method.options: {length: 65}" in str(refusal.value)
    far = changed(words, "method", options={"length": 6400})
    notes = prepare(from_dict(far)).notes
    assert any("training covers only these of the 6,400 positions" in note for note in notes)
    notes = prepare(from_dict(words | {"method": {"name": "lora", "r": 2}})).notes
    assert any("the model knows 16 positions: longlora extends them" in note for note in notes)


def test_the_targets_that_are_resolved_are_the_methods_own(words: dict[str, Any]) -> None:
    assert from_dict(words).resolve().method.targets == ("attention",)
    assert from_dict(words | {"method": {"name": "lora", "r": 2}}).resolve().method.targets == ("all-linear",)
    said = changed(words, "method", targets="all-linear")
    assert from_dict(said).resolve().method.targets == ("all-linear",)
    assert len(prepare(from_dict(said)).plan.sites) == 2 * 7


def test_dpo_learns_in_groups_against_the_base_in_full(tmp_path: Path) -> None:
    model = llama(max_position_embeddings=KNOWN)
    lorary.attach(model, lorary.plan(model, lorary.method("longlora", length=LENGTH, r=2)))
    plain = tiny.logits(llama(max_position_embeddings=KNOWN), input_ids=torch.arange(9)[None])
    trainer = dpo(tmp_path, model, max_steps=2)
    with torch.no_grad():
        reference = trainer.ref_model(input_ids=torch.arange(9)[None]).logits
    assert torch.equal(reference, plain), "the reference is the base, with its own positions"
    trainer.train()
    assert model.config.rope_parameters["factor"] == LENGTH / KNOWN
