"""BnbNF4: lorary's codes, bitsandbytes' kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

import lorary
from lorary.errors import MethodError, PlanError
from lorary.layers import quantized_weight
from lorary.layers.adapted import adapted_layers
from lorary.layers.bitsandbytes import BnbNF4
from lorary.layers.nf4 import NF4
from tests import tiny
from tests.other_libraries import skip_if_right


def base() -> Any:
    return tiny.seeded("LlamaForCausalLM", hidden_size=64, intermediate_size=128)


def attached(backend: str, *names: str, **options: Any) -> Any:
    return tiny.trained(base(), lorary.method("qlora", *names, r=2, backend=backend, **options))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_codes_are_ours(double: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, dtype=dtype)
    ours, theirs = NF4(double=double).quantize(layer), BnbNF4(double=double).quantize(layer)
    assert type(theirs) is bnb.nn.Linear4bit
    assert theirs.bias is layer.bias
    assert torch.equal(theirs.weight, ours.weight)
    assert torch.equal(theirs.weight.quant_state.absmax, ours.absmax)
    dense = quantized_weight.weight(theirs)
    assert dense.dtype == dtype
    torch.testing.assert_close(dense, quantized_weight.weight(ours), rtol=1e-6, atol=0)
    rest = torch.randn(64, 128)
    assert torch.equal(
        BnbNF4(double=double).quantize(layer, rest).weight, NF4(double=double).quantize(layer, rest).weight
    )
    assert quantized_weight.weight(BnbNF4().quantize(layer, rest)).dtype == dtype


@pytest.mark.parametrize("names", [(), ("dora", "rslora"), ("pissa",)], ids="+".join)
def test_the_same_model_as_ours(names: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = attached("lorary", *names), attached("bitsandbytes", *names)
    assert {type(layer.base) for layer in adapted_layers(theirs).values()} == {bnb.nn.Linear4bit}
    live = tiny.logits(theirs)
    assert (tiny.logits(ours) - live).abs().max() < 2e-5
    lorary.save(theirs, tmp_path)
    again = lorary.load(base(), tmp_path)
    assert torch.equal(tiny.logits(again), live)
    assert (tiny.logits(lorary.merge(again)) - live).abs().max() < 2e-5


def test_an_avx512_cpu_does_not_repack_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layer, x = (
        BnbNF4().quantize(torch.nn.Linear(64, 48).eval()),
        torch.randn(3, 64),
    )  # its layout is for multiples of 32
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, quantized_weight.weight(layer), layer.bias))


def test_plan_and_the_meta_device() -> None:
    method = lorary.method("qlora", r=2, backend="bitsandbytes")
    plan = lorary.plan(base(), method)
    assert plan.base_bytes == lorary.plan(base(), lorary.method("qlora", r=2)).base_bytes
    assert len(plan.quantized) == 14
    model = tiny.model("LlamaForCausalLM", device="meta")
    lorary.attach(model, lorary.plan(model, method))
    assert type(model.model.layers[0].mlp.up_proj.base) is bnb.nn.Linear4bit


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MethodError, match=r"backend: 'bitsandbites' is unknown\n.*did you mean `bitsandbytes`"):
        lorary.method("qlora", backend="bitsandbites")
    with pytest.raises(MethodError, match="embeddings: bitsandbytes cannot save an embedding that it has quantised"):
        lorary.method("qlora", backend="bitsandbytes", embeddings=True)
    method = lorary.method("qlora", backend="bitsandbytes")
    with pytest.raises(PlanError, match="kernel for CPUs misreads a weight of 16 x 16 in blocks of 64"):
        lorary.plan(tiny.llama(), method)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="storage: BnbNF4 needs bitsandbytes, which is not installed"):
        lorary.plan(base(), method)


def test_why_rows_that_no_block_divides_are_refused() -> None:
    """bitsandbytes' kernel for CPUs without AVX512 reads them right; skipped on all CPUs, the refusal can go."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 32)
    ours, theirs = quantized_weight.weight(NF4().quantize(layer)), quantized_weight.weight(BnbNF4().quantize(layer))
    skip_if_right("bitsandbytes", torch.allclose(theirs, ours, rtol=1e-6, atol=0))
