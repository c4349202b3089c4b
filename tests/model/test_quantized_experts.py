"""Fused experts in NF4: each matrix by itself, methods on them, merging, reading checkpoints, memory, and refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.errors import LoraryError
from lorary.kernels.grouped import Groups
from lorary.kernels.nf4 import dequantize, quantize
from lorary.kernels.nf4.experts import dequantize_experts, expert, grouped_linear, quantize_experts
from lorary.layers.adapted import adapted_layers
from lorary.layers.nf4 import NF4, NF4Experts
from lorary.layers.quantized_weight import is_quantized, stored_tensors
from lorary.model.fingerprint import Fingerprint
from tests.experts import IDS, MODELS, logits, moe, shake


def qlora(*names: str, **options: Any) -> Any:
    return lorary.method("qlora", *names, r=2, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def close(a: Tensor, b: Tensor, size: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=size, atol=size)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(12, 16), (5, 7), (64, 64)])
def test_each_expert_is_quantised_as_it_would_be_alone(shape: tuple[int, int], double: bool) -> None:
    torch.manual_seed(0)
    W = torch.randn(3, *shape) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    quantized = quantize_experts(W, 64, double)
    for e in range(3):
        alone = quantize(W[e], 64, double)
        for mine, its in zip(expert(quantized, e)[:4], alone[:4], strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or torch.equal(mine, its)
        assert torch.equal(dequantize_experts(quantized)[e], dequantize(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_rows_and_its_gradient_are_those_of_the_dense_matrices(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantized = quantize_experts(torch.randn(5, 24, 64))
    ids = torch.tensor([0, 0, 2, 2, 2, 4] + [4] * 20)  # few rows and many, and two experts without any
    x = torch.randn(len(ids), 64, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, quantized, Groups(ids, 5))
    W = dequantize_experts(quantized, dtype)
    expected = torch.einsum("ti,toi->to", x.float(), W.float()[ids])
    size = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), expected, rtol=size, atol=size * 10)
    g = torch.randn_like(y)
    (gx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(
        gx.float(), torch.einsum("to,toi->ti", g.float(), W.float()[ids]), rtol=size, atol=size * 10
    )
    assert not torch.equal(y, torch.zeros_like(y))


def test_no_rows_at_all() -> None:
    quantized = quantize_experts(torch.randn(2, 4, 8))
    assert grouped_linear(torch.zeros(0, 8), quantized, Groups(torch.zeros(0, dtype=torch.int64), 2)).shape == (0, 4)


def test_compiled_it_is_the_same() -> None:
    torch.manual_seed(0)
    quantized = quantize_experts(torch.randn(3, 8, 64))
    ids = torch.tensor([0, 2, 2])
    x = torch.randn(3, 64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return grouped_linear(x, quantized, Groups(ids, 3)).square().sum()

    eager, compiled = f(x), torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    close(compiled, eager)
    close(*(torch.autograd.grad(y, x)[0] for y in (compiled, eager)))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_with_its_dequantised_experts_and_gets_them_back(name: str) -> None:
    model = moe(name)
    before = [n for n, _ in model.named_parameters()]
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    lorary.quantize(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, NF4Experts)}
    assert layers.keys() == experts.keys()
    base = logits(model)
    lorary.dequantize(model)
    close(logits(model), base)
    assert [n for n, _ in model.named_parameters()] == before
    for path, W in experts.items():
        found = model.get_parameter(path)
        assert found.shape == W.shape
        assert 0.01 < float((found - W).norm() / W.norm()) < 0.15


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_a_trained_adapter_merges_unmerges_and_comes_off(name: str, tmp_path: Path) -> None:
    model = moe(name)
    plan = lorary.plan(model, qlora())
    assert {p.site.name for p in plan.sites if p.site.experts} <= set(plan.quantized)
    lorary.attach(model, plan)
    base = logits(model)
    close(base, logits(lorary.quantize(moe(name))))
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    shake(model)
    live, kept = logits(model), state(model)
    assert (live - base).abs().max() > 0.1
    with lorary.disabled(model):
        assert torch.equal(logits(model), base)
    lorary.save(model, tmp_path / "a")
    assert torch.equal(logits(lorary.load(moe(name), tmp_path / "a")), live)
    assert torch.equal(logits(lorary.load(lorary.quantize(moe(name)), tmp_path / "a")), live)
    lorary.merge(model, keep=True)
    assert not any(m for m in model.modules() if isinstance(m, NF4Experts))
    close(logits(model), live)
    lorary.unmerge(model)
    assert same(state(model), kept)
    assert torch.equal(logits(model), live)
    lorary.detach(model)
    assert torch.equal(logits(model), base)
    assert same(state(model), state(lorary.quantize(moe(name))))


@pytest.mark.parametrize("names", [("rslora",), ("dora",), ("vera",), ("pissa",), ("loftq",), ("lora-fa",)])
def test_methods_on_quantised_experts_obey_their_laws(names: tuple[str, ...], tmp_path: Path) -> None:
    model = moe("GptOssForCausalLM")
    method = qlora(*names) if names != ("loftq",) else lorary.method("loftq", r=2)
    lorary.attach(model, lorary.plan(model, method, targets=["experts.gate_up_proj", "experts.down_proj"]))
    assert any(isinstance(layer.base, NF4Experts) for layer in adapted_layers(model).values())
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    model.eval()
    shake(model, 0.05)
    live = logits(model)
    lorary.save(model, tmp_path / "a")
    assert torch.equal(logits(lorary.load(moe("GptOssForCausalLM"), tmp_path / "a")), live)
    lorary.merge(model)
    close(logits(model), live)


def test_the_start_at_the_quantisation_error_is_nearer_to_the_weights() -> None:
    W = moe().model.layers[0].mlp.experts.down_proj.detach()
    errors = {}
    for name in ("qlora", "loftq"):
        model = moe()
        lorary.attach(model, lorary.plan(model, lorary.method(name, r=4), targets="experts.down_proj"))
        layer = adapted_layers(model)["model.layers.0.mlp.experts.down_proj"]
        errors[name] = [float((layer.merged()[0][e] - W[e]).norm()) for e in range(4)]
    assert all(near < 0.8 * far for near, far in zip(errors["loftq"], errors["qlora"], strict=True))


def test_copies_pickles_and_state_dicts() -> None:
    model = lorary.quantize(moe())
    base = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), base)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), base)
    other = lorary.quantize(moe())
    for m in other.modules():
        if isinstance(m, NF4Experts):
            m.weight.data.zero_()
            m.absmax.zero_()
    assert not torch.equal(logits(other), base)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), base)


def test_a_change_of_precision_leaves_the_codes() -> None:
    model = lorary.quantize(moe()).to(torch.bfloat16)
    layer = next(m for m in model.modules() if isinstance(m, NF4Experts))
    assert (layer.weight.dtype, layer.nested_absmax.dtype, layer.dtype) == (torch.uint8, torch.float32, torch.bfloat16)
    assert logits(model).dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_read_from_a_checkpoint_it_is_what_quantising_in_memory_gives(name: str, tmp_path: Path) -> None:
    moe(name).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    straight = lorary.load_quantized(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole = Fingerprint.of(plain)
    lorary.quantize(plain)
    assert same(state(straight), state(plain))
    assert torch.equal(logits(straight), logits(plain))
    assert Fingerprint.of(straight) == whole == Fingerprint.of(plain)
    for one, other in zip(straight.modules(), plain.modules(), strict=True):
        assert sorted(vars(one)) == sorted(vars(other))
        if "config" in vars(one):
            assert one.config.to_dict() == other.config.to_dict()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_planned_bytes_are_those_that_are_stored() -> None:
    model = moe(hidden_size=64, intermediate_size=64, head_dim=16, num_local_experts=8)
    plan = lorary.plan(model, qlora(), targets=["experts.gate_up_proj", "experts.down_proj"])
    memory = predict(model, plan, Workload(2, 8))
    lorary.attach(model, plan)
    stored = sum(t.numel() * t.element_size() for m in model.modules() if is_quantized(m) for t in stored_tensors(m))
    theirs = {id(t) for m in model.modules() if is_quantized(m) for t in stored_tensors(m)}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in theirs and not p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in theirs)
    assert memory.weights == pytest.approx(stored + rest + buffers, rel=0.01)
    assert plan.base_bytes == pytest.approx(stored + rest, rel=0.01)


def test_backward_keeps_what_it_keeps_of_plain_experts() -> None:
    """No dequantised matrix is kept: as much as over a frozen base in full precision."""
    kept = []
    for names in (("lora",), ("qlora",)):
        model = moe(hidden_size=64, intermediate_size=64, head_dim=16, num_local_experts=8, num_hidden_layers=1)
        lorary.attach(
            model, lorary.plan(model, lorary.method(*names, r=2), targets=["experts.gate_up_proj", "experts.down_proj"])
        )
        embedded = torch.randn(1, 8, 64, requires_grad=True)
        known = [embedded, *model.parameters(), *model.buffers()]
        forward = partial(lambda m, x: m(inputs_embeds=x, use_cache=False).logits, model, embedded)
        kept.append(kept_for_backward(forward, beyond=known))
    assert kept[1] <= kept[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def not_finite() -> None:
    model = moe()
    model.model.layers[1].mlp.experts.down_proj.data[2, 1, 3] = torch.nan
    lorary.quantize(model)


def saved_quantised(tmp_path: Path) -> None:
    lorary.save_quantized(lorary.quantize(moe()), tmp_path / "out")


def loaded(change: Callable[[dict[str, Tensor]], None]) -> None:
    model = lorary.quantize(moe(num_hidden_layers=1))
    tensors = dict(model.state_dict())
    change(tensors)
    model.load_state_dict(tensors)


DOWN = "model.layers.0.mlp.experts.down_proj.weight"


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (not_finite, "model.layers.1.mlp.experts.down_proj: 1 of 1,536 numbers of its weight are NaN or infinite"),
        (
            lambda: loaded(lambda t: t.pop(f"{DOWN}.absmax")),
            f"{DOWN}: absmax none, expected torch.uint8 (4, 6)",
        ),
        (
            lambda: loaded(lambda t: t.update({f"{DOWN}.nested_offset": torch.zeros(3)})),
            f"{DOWN}: nested_offset torch.float32 (3,), expected torch.float32 (4,)",
        ),
        (
            lambda: loaded(lambda t: t.update({DOWN: t[DOWN][:3]})),
            f"{DOWN}: codes torch.uint8 (3, 192, 1), expected torch.uint8 (4, 192, 1)",
        ),
        (
            lambda: loaded(lambda t: t.update({f"{DOWN}.scale": torch.zeros(3)})),
            f'Unexpected key(s) in state_dict: "{DOWN}.scale"',
        ),
        (lambda: lorary.load_quantized("no/such", lorary.NF4(experts=1)), "NF4 has experts = 1; it takes"),
        (
            lambda: lorary.method("qlora", "pissa", r=2) and attach_to_quantised("pissa"),
            "is quantised already, and SVDInit has to subtract its start from the weight",
        ),
        (
            lambda: attach_to_quantised("loftq"),
            "is quantised already, and QuantizationErrorInit has to subtract its start from the weight",
        ),
    ],
)
def test_refusals(act: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((LoraryError, RuntimeError)) as error:
        act()
    assert sentence in str(error.value)


def attach_to_quantised(name: str) -> None:
    lorary.plan(lorary.quantize(moe()), lorary.method(name, r=2), targets="experts.down_proj")


def test_bitsandbytes_format_refuses_experts_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LoraryError) as error:
        saved_quantised(tmp_path)
    assert (
        "model.layers.0.mlp.experts.gate_up_proj: holds quantised experts, which bitsandbytes' format of matrices does "
        "not support\n      hint: leave them plain with NF4(experts=False), or let load_quantized quantise the plain "
        "checkpoint"
    ) in str(error.value)
    assert not (tmp_path / "out").exists()
    lorary.save_quantized(model := lorary.quantize(moe(), NF4(experts=False)), tmp_path / "out")
    assert torch.equal(logits(lorary.load_quantized(tmp_path / "out")), logits(model))
