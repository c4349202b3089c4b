"""(IA)³ and bottleneck adapters from a configuration to a generated text, and what becomes of them afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lorary
from lorary.cli import app
from lorary.errors import ConfigError, MethodError
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from tests.train.runs import base_folder, changed, configuration

METHODS: dict[str, dict[str, Any]] = {"ia3": {}, "houlsby": {"m": 4, "activation": "relu"}}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base_folder(tmp_path / "base"), tmp_path / "data.jsonl")


def with_method(words: dict[str, Any], name: str) -> dict[str, Any]:
    tree = words | {"method": {"name": name, "options": METHODS[name]}}
    return changed(tree, "training", gradient_checkpointing=True, lr=None)


def invoked(*arguments: str) -> Any:
    return CliRunner().invoke(app(), list(arguments))


@pytest.mark.parametrize("name", METHODS)
def test_trained_resumed_evaluated_and_generated(words: dict[str, Any], name: str, tmp_path: Path) -> None:
    tree = with_method(words, name)
    prepared = prepare(from_dict(tree))
    assert prepared.config.training.lr == lorary.presets()[name].lr
    assert prepared.plan.method == lorary.method(name, **METHODS[name])
    done = run(from_dict(tree), quiet=True)
    assert done.steps == 6
    adapter = tmp_path / "out" / "adapter"
    files = {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}
    for late in ("adapter", "checkpoint-6", "checkpoints/checkpoint-6"):  # as a kill after step 4 leaves it
        shutil.rmtree(tmp_path / "out" / late, ignore_errors=True)
    run(from_dict(tree), quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")} == files
    for command in (["eval", "base", "out", "--data", "data.jsonl"], ["generate", "out", "hello world"]):
        ran = invoked(*command)
        assert ran.exit_code == 0, ran.output


def test_what_becomes_of_each(words: dict[str, Any], tmp_path: Path) -> None:
    """(IA)³ is merged, and written as PEFT's; bottleneck adapters are neither, and nothing is written."""
    for name in METHODS:
        run(from_dict(with_method(words, name) | {"output": name}), quiet=True)
    merged = invoked("merge", "ia3", "merged-ia3")
    assert merged.exit_code == 0, merged.output
    exported = invoked("export", "ia3", "peft-ia3", "--to", "peft")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "peft-ia3" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    exports = (("export", "houlsby", "out", "--to", form) for form in ("merged", "peft"))
    for command in (("merge", "houlsby", "out"), *exports):
        ran = invoked(*command)
        assert ran.exit_code != 0, command
        assert not (tmp_path / "out").exists(), command
        said = f"{ran.output}{ran.exception or ''}"
        assert "a non-linear network, which no weight and bias can" in " ".join(said.split()), said


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "ia3", "r": 8}, "ia3 sets NoUpdate(), which has no rank"),
    ({"name": "ia3", "alpha": 8}, "ia3 sets ConstantScale(s=1.0), which has no alpha"),
    ({"name": "houlsby", "dropout": 0.1}, "Bottleneck adds no update whose input dropout could act on"),
    ({"name": "houlsby", "ranks": {"o_proj": 8}}, "Bottleneck has no rank"),
    ({"name": "houlsby", "options": {"activation": "swish"}}, "Bottleneck has activation = 'swish'"),
    ({"name": "houlsby", "options": {"position": "attention"}}, "Bottleneck has position = 'attention'"),
    ({"name": "houlsby", "options": {"m": "wide"}}, "Bottleneck has m = 'wide'"),
    ({"name": "houlsby", "options": {"bottleneck": 8}}, "`bottleneck` is not an option"),
    ({"name": "ia3", "options": {"feed_forward": [3]}}, "Rescaling has feed_forward = (3,)"),
    ({"name": "ia3,dora"}, "ia3 and dora both choose how the update joins the weight"),
    ({"name": "ia3", "drop": {"threshold": 0.9}}, "Rescaling changes a layer's output by more than s B A x"),
]


@pytest.mark.parametrize(("method", "message"), BAD, ids=[str(method) for method, _ in BAD])
def test_a_bad_configuration_is_refused_before_anything_is_written(
    words: dict[str, Any], method: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, MethodError, lorary.errors.PlanError)) as refusal:
        run(from_dict(words | {"method": method}), quiet=True)
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()
