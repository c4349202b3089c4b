"""Runs of mixtures of experts from a configuration: in 4 bits from the file on, and the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.layers.nf4 import NF4Experts
from lorary.model.loading import quantized
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.build import build_model
from lorary.train.runner.prepare import prepare
from tests.experts import moe, shake
from tests.train.runs import configuration, tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    of_text = tokenizer()
    model = moe("Qwen3MoeForCausalLM", vocab_size=len(of_text), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder / "base")
    of_text.save_pretrained(folder / "base")
    return configuration(folder / "base", folder / "data.jsonl") | {"method": {"name": "qlora", "r": 4}}


def adapters(folder: Path) -> dict[str, Tensor]:
    found = lorary.load_adapter(folder)
    return {f"{site}.{role}": t for site, roles in found.tensors.items() for role, t in roles.items()}


def test_a_run_trains_experts_in_4_bits_that_it_never_held_plain(
    words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    load = quantized.load
    monkeypatch.setattr(quantized, "load", lambda *given, **more: read.append(given) or load(*given, **more))
    result = run(from_dict(words | {"output": str(tmp_path / "out")}), quiet=True)
    assert read
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < losses[0]
    trained = adapters(tmp_path / "out" / "adapter")
    assert any(name.endswith("experts.down_proj.B") and t.any() for name, t in trained.items())


def test_the_model_of_a_run_is_the_one_that_its_adapter_is_loaded_onto(words: dict[str, Any], tmp_path: Path) -> None:
    prepared = prepare(from_dict(words | {"output": str(tmp_path / "out")}))
    model = build_model(prepared)
    assert sum(isinstance(m, NF4Experts) for m in model.modules()) == 4
    shake(model)
    lorary.save(model, tmp_path / "start")
    again = lorary.load(lorary.load_quantized(words["model"], dtype="float32"), tmp_path / "start")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model.float()(ids).logits, again(ids).logits, rtol=1e-5, atol=1e-5)
