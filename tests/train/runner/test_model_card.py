"""The model card's metadata: what the Hub indexes, and nothing that is not on the Hub."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import lorary
from lorary.train import Run
from lorary.train.config.load import from_dict
from lorary.train.runner.model_card import CardData, model_card
from tests import tiny

HISTORY = (
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.5},
    {"step": 2, "eval_loss": 1.5},
    {"step": 4, "loss": 1.25, "eval_loss": 2.0},
)


def made(where: Path, peft: bool = True, **changed: Any) -> ModelCard:
    """The card of a run with a base and data of the Hub, changed here and there."""
    (where / "adapter").mkdir()
    if peft:
        (where / "adapter" / "adapter_config.json").write_text("{}")
    tree = {
        "model": "org/base",
        "data": {"train": ["org/rows#train", "builtin:topics"], "validation_split": 0.1},
        "method": {"name": "dora"},
    }
    changed["training"] = {"lr": 1e-4} | changed.get("training", {})
    data = CardData(
        config=from_dict(tree | changed),
        plan=lorary.plan(tiny.model("LlamaForCausalLM"), lorary.method("dora", r=2)),
        rows=(10, 2),
        labelled=0.5,
        tokens=100,
        run=Run(where, steps=4, history=HISTORY, interrupted=0, seconds=1.0, predicted=None, measured=2**20),
    )
    return ModelCard(model_card("my-run", data))


def test_the_hub_finds_base_data_and_metrics(tmp_path: Path) -> None:
    data = made(tmp_path).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["datasets"] == ["org/rows"], "what comes along is not on the Hub"
    assert data["library_name"] == "peft"
    assert data["metrics"] == ["loss", "perplexity"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["dora", "lorary", "sft"]


def test_the_results_are_those_of_the_adapter_that_was_kept(tmp_path: Path) -> None:
    for name in ("last", "best", "stopped"):
        (tmp_path / name).mkdir()
    steps = {"eval_steps": 2, "save_steps": 2}
    last = made(tmp_path / "last")
    best = made(tmp_path / "best", training=steps | {"keep_best": True})
    stopped = made(tmp_path / "stopped", training=steps | {"early_stopping_patience": 2})
    for found, loss, step in ((last, 2.0, 4), (best, 1.5, 2), (stopped, 1.5, 2)):
        values = {result.metric_type: result.metric_value for result in found.data.eval_results or []}
        assert values == {"loss": loss, "perplexity": round(math.exp(loss), 4)}
        assert f"{loss:.4f} (perplexity {math.exp(loss):.2f}) at step {step} |" in found.text
    result = (last.data.eval_results or [])[0]
    assert (result.dataset_type, result.dataset_name) == ("org/rows", "org/rows#train, builtin:topics")
    assert last.data.model_name == "my-run"


def test_a_preference_loss_is_no_perplexity(tmp_path: Path) -> None:
    found = made(tmp_path, task="dpo")
    assert found.data.metrics == ["loss"]
    assert "perplexity" not in found.content


def test_a_folder_of_the_machine_is_not_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/base").mkdir(parents=True)
    Path("org/rows").mkdir()
    found = made(tmp_path, peft=False)
    data = found.data.to_dict()
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(data)
    assert data["library_name"] == "lorary"
    assert "PEFT" not in found.text
