"""aLoRA from a configuration to a generated text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lorary
from lorary.cli import app
from lorary.errors import ConfigError, DataError, MethodError
from lorary.methods.alora import invocation_of
from lorary.serve.forms.form import serving_form
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from tests.train.runs import base_folder, changed, configuration

CALL = "<answer>"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Questions of which two thirds end with the invocation."""
    monkeypatch.chdir(tmp_path)
    tree = configuration(base_folder(tmp_path / "base"), tmp_path / "data.jsonl")
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["prompt"] += CALL if i % 3 else ""
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = changed(tree, "training", lr=1e-2, gradient_checkpointing=True)
    return tree | {"method": {"name": "alora", "r": 4, "options": {"invocation": CALL}}}


def test_trained_resumed_evaluated_and_generated(words: dict[str, Any], tmp_path: Path) -> None:
    prepared = prepare(from_dict(words))
    ids = tuple(AutoTokenizer.from_pretrained("base")(CALL, add_special_tokens=False)["input_ids"])
    assert {invocation_of(p.method) for p in prepared.plan.sites} == {invocation_of(prepared.plan.method)} == {ids}
    assert f"acts from the last {CALL!r} of a text on; before it, and in texts without it, this is the base" in (
        prepared.notes
    )
    (note,) = (note for note in prepared.notes if "training rows have no" in note)
    without = sum(CALL not in prepared.tokenizer.decode(row["input_ids"]) for row in prepared.train.rows)
    assert note == (
        f"{without} of 19 training rows have no invocation {CALL!r} ({len(ids)} tokens): the adapter is off there"
    )
    done = run(from_dict(words), quiet=True)
    losses = [record["loss"] for record in done.history if "loss" in record]
    assert done.steps == 6
    assert losses[-1] < losses[0]
    adapter = tmp_path / "out" / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["alora_invocation_tokens"] == list(ids)
    files = {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}
    for late in ("adapter", "checkpoint-6", "checkpoints/checkpoint-6"):  # as a kill after step 4 leaves it
        shutil.rmtree(tmp_path / "out" / late, ignore_errors=True)
    run(from_dict(words), quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")} == files
    told: dict[tuple[str, str], str] = {}
    for model in ("base", "out"):
        for prompt in ("hello world", f"hello world{CALL}"):
            ran = CliRunner().invoke(app(), ["generate", model, prompt, "--max-new-tokens", "8"])
            assert ran.exit_code == 0, ran.output
            told[model, prompt] = ran.stdout
    assert told["base", "hello world"] == told["out", "hello world"]
    assert told["base", f"hello world{CALL}"] != told["out", f"hello world{CALL}"]
    ran = CliRunner().invoke(app(), ["eval", "base", "out", "--data", "data.jsonl"])
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(app(), ["merge", "out", "merged"])
    assert ran.exit_code != 0
    assert "acts on the tokens from the invocation on alone" in str(ran.exception or ran.output)
    assert not Path("merged").exists()


def test_data_without_the_invocation_is_refused(words: dict[str, Any]) -> None:
    tree = words | {"method": {"name": "alora", "options": {"invocation": "<nowhere>"}}}
    with pytest.raises(DataError) as refused:
        prepare(from_dict(tree))
    assert "is in none of the 19 training rows, so nothing would train" in str(refused.value)
    assert "the invocation '<nowhere>'" in str(refused.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has no invocation, from which on it could act"),
        ({"invocation": [5, 4000]}, "token 4000 of the invocation is outside the vocabulary of 300"),
        ({"invocation": []}, "`invocation` is []; it takes a text, or token ids"),
        ({"invocation": ["a"]}, "`invocation` is ['a']; it takes a text, or token ids"),
    ],
    ids=str,
)
def test_bad_invocations(words: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, MethodError, lorary.errors.PlanError)) as refused:
        prepare(from_dict(words | {"method": {"name": "alora", "options": options}}))
    assert said in str(refused.value)
    assert not Path("out").exists()


def test_the_serving_engine_refuses_it() -> None:
    from tests import tiny

    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("alora", invocation=(5,))))
    with pytest.raises(MethodError) as refused:
        serving_form(lorary.Adapter.of(model), tiny.seeded("LlamaForCausalLM"))
    said = str(refused.value)
    assert "context: acts from an invocation on, and a batch cannot add it to a part of a row only" in said
    assert "lorary generate, chat and eval compute it" in said
