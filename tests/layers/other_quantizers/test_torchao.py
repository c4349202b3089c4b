"""Bases that torchao has quantised, as Transformers loads them: tensors of a class of their own in plain layers.

torchao makes every import of Transformers slower by a second, so it is no part of the set-up for development:
`pip install torchao` runs these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorary
from lorary.errors import PlanError
from lorary.layers import quantized_weight
from tests import tiny
from tests.layers.other_quantizers.checks import check_adapter

quantization = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")

CONFIGS: dict[str, Any] = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(8)),
    "float8": quantization.Float8WeightOnlyConfig(),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny.seeded("LlamaForCausalLM").save_pretrained(folder)
    return folder


def load(plain: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    words = {"quantization_config": transformers.TorchAoConfig(config), "dtype": dtype}
    return transformers.LlamaForCausalLM.from_pretrained(plain, **words)


@pytest.mark.parametrize("preset", ["lora", "dora", "vera", "lora-fa"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_base_is_adapted(kind: str, preset: str, plain: Path, tmp_path: Path) -> None:
    options = {"r": 8} if preset == "vera" else {"r": 2}
    method = lorary.method(preset, **options)
    check_adapter(lambda: load(plain, CONFIGS[kind]), method, tmp_path / "adapter", 1e-4)


def test_the_dense_weight_and_its_bytes(plain: Path) -> None:
    model = load(plain, CONFIGS["int8"])
    layer = model.model.layers[0].mlp.down_proj
    W = quantized_weight.weight(layer)
    assert type(W) is torch.Tensor
    assert not W.requires_grad
    assert quantized_weight.is_quantized(layer)
    torch.testing.assert_close(W, quantized_weight.weight_by_forward(layer), rtol=0, atol=1e-6)
    base = lorary.plan(tiny.seeded("LlamaForCausalLM"), lorary.method("lora", r=2))
    plan = lorary.plan(model, lorary.method("lora", r=2))
    numbers = sum(p.site.out_features * p.site.in_features for p in plan.sites)
    rows = sum(p.site.out_features for p in plan.sites)
    assert plan.total == base.total
    assert plan.base_bytes <= base.base_bytes - 3 * numbers + 8 * rows  # a byte each, and something for each row


def test_merged_in_the_model_s_precision(plain: Path, tmp_path: Path) -> None:
    model = load(plain, CONFIGS["int8"], torch.bfloat16)
    merged: Any = lorary.merge(tiny.trained(model, lorary.method("lora", r=2)))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(merged))


def test_what_lets_no_gradient_through_and_what_wants_the_weight(plain: Path) -> None:
    model = load(plain, quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(PlanError, match=r"q_proj: Int8Tensor lets no gradient through"):
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    model = load(plain, CONFIGS["int8"])
    with pytest.raises(PlanError, match=r"q_proj\.weight: is quantised, and DeltaLoRAPaperRule writes it"):
        lorary.plan(model, lorary.method("delta-lora", r=2, mode="paper"))
    with pytest.raises(PlanError, match=r"up_proj\.weight: is quantised and cannot train in full"):
        lorary.plan(model, lorary.method("lora", r=2, full=("up_proj",)), "q_proj")
