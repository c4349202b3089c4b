"""What quantising would lose, or could not hold: refused before anything changes, or kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.errors import LoraryError, StateError
from lorary.layers.quantized_weight import is_quantized
from lorary.model.quantize import QuantizationWarning
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_no_weight_is_dequantised_to_whole_numbers(dtype: Any) -> None:
    with pytest.raises(StateError) as caught:
        lorary.dequantize(lorary.quantize(tiny.llama()), dtype)
    expected = f"cannot dequantise:\n  - dtype: is {dtype!r}\n      hint: use torch.bfloat16 or torch.float32"
    assert str(caught.value) == expected


def test_a_double_that_32_bits_do_not_hold_is_found_before_anything_is_quantised() -> None:
    model = tiny.seeded("LlamaForCausalLM").double()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[1, :2] = 1e300
    what = "up_proj: 2 of 384 numbers of its weight are NaN or infinite in 32 bits, and cannot be quantised"
    refused: list[Callable[[], Any]] = [
        lambda: lorary.quantize(model),
        lambda: lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2))),
    ]
    for call in refused:
        with pytest.raises(LoraryError, match=what):
            call()
        assert not any(map(is_quantized, model.modules()))


@pytest.mark.parametrize("attach", [False, True])
def test_a_layer_is_called_with_its_hooks_all_the_same(attach: bool) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    calls: list[str] = []
    up = model.model.layers[0].mlp.up_proj
    hooks = [up.register_forward_hook(lambda *_: calls.append("after"))]
    hooks.append(up.register_forward_pre_hook(lambda *_: calls.append("before")))
    if attach:
        lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2)))
    else:
        lorary.quantize(model)
    tiny.logits(model)
    assert calls == ["before", "after"]
    lorary.dequantize(lorary.merge(model) if attach else model)
    tiny.logits(model)
    assert calls == ["before", "after"] * 2
    for hook in hooks:
        hook.remove()
    tiny.logits(model)
    assert len(calls) == 4


def test_a_forward_that_was_replaced_is_not_lost_in_silence(tmp_path: Path) -> None:
    method = lorary.method("qlora", r=2)
    model = tiny.seeded("LlamaForCausalLM")
    lorary.save(tiny.trained(model, method), tmp_path / "adapter")
    model = tiny.seeded("LlamaForCausalLM")
    up = model.model.layers[0].mlp.up_proj
    up.forward = lambda x: 2 * nn.Linear.forward(up, x)
    before = tiny.everything(model)
    what = "up_proj: its forward was replaced, by Accelerate or by hand, and the quantised layer would not use it"
    refused: list[Callable[[], Any]] = [
        lambda: lorary.quantize(model),
        lambda: lorary.attach(model, lorary.plan(model, method)),
        lambda: lorary.load(model, tmp_path / "adapter"),
    ]
    for call in refused:
        with pytest.raises(LoraryError, match=what):
            call()
        assert tiny.everything(model) == before


def test_an_adapter_of_a_base_that_was_quantised_otherwise_says_so(tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.save(tiny.trained(model, lorary.method("qlora", r=2, block=128)), tmp_path / "adapter")
    lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "adapter")  # quantises it as it was
    base = lorary.quantize(tiny.seeded("LlamaForCausalLM"))
    with pytest.warns(QuantizationWarning) as told:
        lorary.load(base, tmp_path / "adapter")
    assert str(told[0].message) == (
        "the adapter was trained on a base in NF4(block=128, double=True, compute=None, embeddings=False, "
        "experts=True); 14 of 14 quantised layers here are in blocks of 64 with double=True, and have another "
        "quantisation error. Quantise the base as the adapter says"
    )


def test_the_sum_of_adapters_of_quantised_bases_quantises_its_base_too() -> None:
    model = tiny.trained(tiny.seeded("LlamaForCausalLM"), lorary.method("qlora", r=2))
    adapter = lorary.Adapter.of(model)
    lorary.switch(model, [adapter, adapter])
    expected = tiny.logits(model)
    fresh = lorary.switch(tiny.seeded("LlamaForCausalLM"), [adapter, adapter])
    assert torch.equal(tiny.logits(fresh), expected)


def test_quantised_in_inference_mode_it_can_be_trained() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    with torch.inference_mode():
        lorary.quantize(model)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
