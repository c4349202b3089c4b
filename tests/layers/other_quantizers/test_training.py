"""The trainer on a base that Transformers has quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.train import runs


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_a_packed_base_is_trained_with_masters_in_32_bits(kind: str, tmp_path: Path) -> None:
    runs.llama(hidden_size=64).save_pretrained(tmp_path / "base")
    words = {"quantization_config": transformers.BitsAndBytesConfig(**{kind: True})}
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", **words)
    before = tiny.frozen_copy(base)
    model: Any = runs.adapted(model=base)
    trainer = runs.sft(tmp_path / "run", model, max_steps=6)
    assert getattr(model, kind.replace("load", "is_loaded"))
    assert model.is_quantized
    result = trainer.train()
    assert result.global_step == 6
    for layer in adapted_layers(model).values():
        assert {p.dtype for p in layer.params.values()} == {torch.float32}
        assert layer.params["B"].any()
    for name, tensor in before.items():
        path, _, last = name.rpartition(".")
        if path.endswith("_proj") and last == "weight":
            assert torch.equal(adapted_layers(model)[path].weight, tensor)
