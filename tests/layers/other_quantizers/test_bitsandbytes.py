"""Bases that bitsandbytes has quantised, as Transformers loads them, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers

import lorary
from lorary.errors import PlanError
from lorary.layers import quantized_weight
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.layers.other_quantizers.checks import check_adapter

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
SLACK = {"nf4": 1e-4, "fp4": 1e-4, "int8": 0.25}  # 8-bit layers round their inputs to 8 bits as well


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny.seeded("LlamaForCausalLM", hidden_size=64, intermediate_size=64).save_pretrained(folder)
    return folder


def load(plain: Path, kind: str, **words: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**CONFIGS[kind])
    return transformers.LlamaForCausalLM.from_pretrained(plain, quantization_config=config, **words)


@pytest.fixture(scope="module")
def bases(plain: Path) -> dict[str, Callable[[], Any]]:
    return {kind: partial(load, plain, kind) for kind in CONFIGS}


METHODS = {
    "lora": {"r": 2},
    "dora": {"r": 2},
    "rslora": {"r": 2},
    "vera": {"r": 8},
    "adalora": {"r": 4, "target": 2},
    "lora-fa": {"r": 2},
}


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt")
@pytest.mark.parametrize("preset", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_base_is_adapted(kind: str, preset: str, bases: dict[str, Callable[[], Any]], tmp_path: Path) -> None:
    method = lorary.method(preset, **METHODS[preset])
    check_adapter(bases[kind], method, tmp_path / "adapter", SLACK[kind])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_dense_weight_is_what_the_layer_multiplies_by(kind: str, bases: dict[str, Callable[[], Any]]) -> None:
    layer = bases[kind]().model.layers[0].mlp.down_proj
    W = quantized_weight.weight(layer)
    assert W.shape == (64, 64)
    assert not W.requires_grad
    torch.testing.assert_close(W, quantized_weight.weight_by_forward(layer, rows=24), rtol=0, atol=1e-5)


def test_sizes_are_those_of_the_codes(bases: dict[str, Callable[[], Any]]) -> None:
    plan = lorary.plan(bases["int8"](), lorary.method("lora", r=2))
    plain = tiny.seeded("LlamaForCausalLM", hidden_size=64, intermediate_size=64)
    linear = [p for n, p in plain.named_parameters() if "_proj" in n]
    rows = sum(p.shape[0] for p in linear)
    numbers = sum(p.numel() for p in linear)
    assert plan.total == sum(p.numel() for p in plain.parameters())
    assert plan.base_bytes == 4 * (plan.total - numbers) + numbers + 4 * rows  # a code each, a scale a row


def test_pissa_wants_the_full_weight(bases: dict[str, Callable[[], Any]]) -> None:
    with pytest.raises(PlanError) as error:
        lorary.plan(bases["nf4"](), lorary.method("pissa", r=2), "q_proj")
    first = str(error.value).splitlines()[1]
    where = "model.layers.0.self_attn.q_proj and 1 more"
    assert first == f"  - {where}: is quantised already, and SVDInit has to subtract its start from the weight"


def test_a_packed_weight_cannot_train_in_full(bases: dict[str, Callable[[], Any]]) -> None:
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj\.weight: is quantised and cannot train in full"):
        lorary.plan(bases["int8"](), lorary.method("lora", r=2, full=("layers.1.mlp.up_proj",)), "q_proj")


def test_an_adapter_fits_the_plain_base_and_no_other(
    bases: dict[str, Callable[[], Any]], plain: Path, tmp_path: Path
) -> None:
    model = tiny.trained(bases["nf4"](), lorary.method("lora", r=2))
    lorary.save(model, tmp_path)
    dense = transformers.LlamaForCausalLM.from_pretrained(plain)
    assert (tiny.logits(lorary.load(dense, tmp_path)) - tiny.logits(model)).abs().max() < 0.1
    lorary.load(bases["fp4"](), tmp_path)  # quantised differently, from the same weights
    other = bases["nf4"]()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(lorary.errors.FileError, match="base: other weights"):
        lorary.load(other, tmp_path)


def test_merged_it_is_a_plain_model_on_disk(bases: dict[str, Callable[[], Any]], plain: Path, tmp_path: Path) -> None:
    model = tiny.trained(load(plain, "int8", dtype=torch.bfloat16), lorary.method("lora", r=2))
    merged: Any = lorary.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(merged))


def test_unmerge_and_dequantize(bases: dict[str, Callable[[], Any]]) -> None:
    model = bases["nf4"]()
    before = tiny.frozen_copy(model)
    live = tiny.logits(tiny.trained(model, lorary.method("lora", r=2)))
    lorary.merge(model, keep=True)
    lorary.unmerge(model)
    assert torch.equal(tiny.logits(model), live)
    lorary.detach(model)
    assert tiny.same(before, tiny.frozen_copy(model))
    dense = tiny.logits(model)
    lorary.dequantize(model)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not model.is_quantized
    assert (tiny.logits(model) - dense).abs().max() < 3e-6


@pytest.mark.parametrize("cls", [bnb.nn.EmbeddingNF4, bnb.nn.Embedding8bit])
def test_embeddings(cls: Any) -> None:
    table = torch.nn.Embedding(50, 64)
    packed = cls(50, 64)
    packed.load_state_dict(table.state_dict())
    packed = packed.to("cpu")
    model = torch.nn.Sequential(packed, torch.nn.Linear(64, 3))
    ids = torch.arange(50)
    rows = packed(ids)
    torch.testing.assert_close(quantized_weight.weight(packed), rows)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "0"))
    tiny.shaken(model)
    live = model(ids)
    assert not torch.equal(model[0](ids), rows)
    lorary.merge(model)
    assert type(model[0]) is torch.nn.Embedding
    torch.testing.assert_close(model(ids), live)


def test_what_an_avx512_cpu_makes_of_the_codes_is_read() -> None:
    torch.manual_seed(0)
    for double in (True, False):
        layer = bnb.nn.Linear4bit(64, 32, compress_statistics=double, quant_type="nf4").to("cpu")
        W = quantized_weight.weight(layer)
        there = copy.deepcopy(layer)
        codes, state = bnb.functional._convert_weight_packed_for_cpu(there.weight.data, there.weight.quant_state)
        there.weight.data, there.weight.quant_state = codes, state
        assert codes.shape != layer.weight.shape
        for _ in range(2):  # reading changes nothing
            assert (quantized_weight.weight(there) - W).abs().max() < 2e-3  # its scales are bfloat16
        assert state.packing_format_for_cpu


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_evaluating_on_an_avx512_cpu_takes_no_gradient_away(kind: str, tmp_path: Path) -> None:
    """What it has made of the codes before is undone, and is not done again: in layers without adapters, too."""
    tiny.seeded("LlamaForCausalLM", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    model = load(tmp_path, kind)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    packed = [quantized_weight.weight(layer) for layer in layers]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as such a CPU says
        with torch.inference_mode():
            codes, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
            layer.weight.data = codes
    dense = lorary.dequantize(copy.deepcopy(model))
    for each in (model, dense):
        tiny.trained(each, lorary.method("lora", r=2), "q_proj")
    for layer, W in zip(layers, packed, strict=True):
        torch.testing.assert_close(quantized_weight.weight(layer), W, rtol=2**-8, atol=0)  # its scales are bfloat16
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense), rtol=0, atol=3e-6)
    assert not any(layer.weight.quant_state.packing_format_for_cpu for layer in layers)
    saved = tiny.frozen_copy(model)
    for each in (model, dense):
        each.train()(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    for ours, its in zip(adapted_layers(model).values(), adapted_layers(dense).values(), strict=True):
        for role, p in ours.params.items():
            torch.testing.assert_close(p.grad, its.params[role].grad, rtol=1e-4, atol=1e-7)
    assert tiny.same(saved, tiny.frozen_copy(model))


def test_before_it_is_packed_a_layer_is_dense() -> None:
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
    assert torch.equal(quantized_weight.weight(layer), layer.weight.data)
    eight = bnb.nn.Linear8bitLt(64, 32)
    assert torch.equal(quantized_weight.weight(eight), eight.weight.data)
