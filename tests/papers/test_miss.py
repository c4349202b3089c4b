"""MiSS: one matrix for all shards of the inputs, applied to their sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary import builtin
from lorary.layers.adapted import adapted_layers
from lorary.methods.miss import shard_sums

from .. import tiny
from .layers import attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature

# inputs of which 3 is a divisor, and inputs of which the last shard is shorter
EACH = pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 4),
        lambda: nn.Linear(8, 4, bias=False),
        lambda: Conv1D(4, 6),
        lambda: Conv1D(4, 7),
        lambda: nn.Linear(3, 4),
    ],
    ids=["linear", "linear, a short shard", "transposed", "transposed, a short shard", "one shard"],
)


def expanded(D: Tensor, inputs: int) -> Tensor:
    """expand(D) [out, in] of D [out, r], column by column: what makes expand(D) x equal to D S (equation 7)."""
    return torch.stack([D[:, j % D.shape[1]] for j in range(inputs)], 1)


def given(layer: Any) -> Tensor:
    return torch.randn(5, layer.site.in_features).double()


@EACH
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any) -> None:
    layer = attached(make(), "miss")
    x = given(layer)
    assert not layer.params["D"].any()
    assert torch.equal(layer(x), layer.base(x))
    assert signature(layer, x) == {"D": "some"}


@EACH
def test_it_is_the_weight_plus_the_expanded_matrix(make: Any) -> None:
    layer = shake(attached(make(), "miss"))
    x, W, inputs = given(layer), matrix(layer), layer.site.in_features
    same_function(layer, x, W + expanded(layer.params["D"].detach(), inputs))
    exactly(gradients(layer, x), dense_gradients(layer, x, lambda p: W + expanded(p["D"], inputs)))
    exactly(layer.merged()[0], W + expanded(layer.params["D"].detach(), inputs))


def test_the_input_is_summed_in_shards_of_r() -> None:
    """Equations 4 to 6: x^(i) = x[(i-1) r : i r], S = sum of the x^(i)."""
    x, r = torch.randn(2, 3, 12), 4
    S = torch.zeros(2, 3, r)
    for i in range(1, 12 // r + 1):
        S += x[:, :, (i - 1) * r : i * r]
    torch.testing.assert_close(shard_sums(x, r), S)
    assert shard_sums(x[:0], r).shape == (0, 3, 4)
    padded = torch.cat([x, torch.zeros(2, 3, 3)], -1)
    torch.testing.assert_close(shard_sums(x, 5), shard_sums(padded, 5))


@pytest.mark.parametrize("mini_r", [1, 2, 4])
def test_mini_repeats_its_rows_down_the_outputs(mini_r: int) -> None:
    layer = shake(attached(nn.Linear(7, 4), "miss", mini_r=mini_r))
    D, x = layer.params["D"].detach(), given(layer)
    assert D.shape == (mini_r, 3)
    whole = torch.stack([D[i % mini_r] for i in range(4)])
    same_function(layer, x, matrix(layer) + expanded(whole, 7))
    exactly(layer.merged()[0], matrix(layer) + expanded(whole, 7))


@pytest.mark.parametrize("mini_r", [None, 8])
def test_the_parts_of_a_fused_weight_share_the_sums(mini_r: int | None) -> None:
    model = tiny.seeded("GPT2LMHeadModel").double()
    method = lorary.method("miss", r=5, mini_r=mini_r)
    lorary.attach(model, lorary.plan(model, method, "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["transformer.h.0.attn.c_attn"])
    D = layer.params["D"].detach()
    q, v = D.chunk(2)
    q, v = (part if mini_r is None else part.repeat(2, 1) for part in (q, v))
    B, A = layer.factors()
    assert (B.shape, A.shape) == ((48, 5), (5, 16))
    whole = torch.cat([q, torch.zeros(16, 5).double(), v])
    same_function(layer, torch.randn(3, 16).double(), matrix(layer) + expanded(whole, 16))


def llama_2_7b() -> Any:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("r", "expected", "said"),
    [(16, 21_757_952, "21.7"), (32, 43_515_904, "43.5"), (64, 87_031_808, "87.0"), (128, 174_063_616, "174.0")],
)
def test_the_papers_counts(r: int, expected: int, said: str) -> None:
    """Tables 5 and 7: out * r at each of the seven linear layers of a block. The paper cuts its digits off."""
    trained = lorary.plan(llama_2_7b(), lorary.method("miss", r=r)).trainable
    assert trained == expected
    assert str(trained / 1e6).startswith(said)


def test_mini_counts() -> None:
    """The authors' script: 64 x 64 numbers for each layer."""
    assert lorary.plan(llama_2_7b(), lorary.method("miss", mini_r=64)).trainable == 7 * 32 * 64 * 64


def test_the_count_in_the_authors_readme_is_loras() -> None:
    """3,686,400 for Qwen2.5-3B at r = 16, q and v."""
    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 151936}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=16, num_key_value_heads=2)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    trained = {n: lorary.plan(model, lorary.method(n, r=16), "attention-qv").trainable for n in ("lora", "miss")}
    assert trained == {"lora": 3_686_400, "miss": 1_327_104}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_r_numbers_for_each_row(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 16)).to(dtype)
    lorary.attach(model, lorary.plan(model, lorary.method("miss", r=4), "0"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(100, 64, dtype=dtype))
    assert sum(t.numel() for t in kept if len(t) == 100) == 100 * 4
    assert max(t.numel() for t in kept) < 100 * 64


def test_it_is_a_lora_whose_a_is_a_row_of_identities() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("miss", r=5)))
    for layer in adapted_layers(model).values():
        shake(layer, 0.1)
    y, forms = tiny.logits(model), lorary.Adapter.of(model).low_rank()
    for form in forms.values():
        assert form.A.shape[0] == 5
        assert torch.equal(form.A, expanded(torch.eye(5), form.A.shape[1]))
    plain = tiny.seeded("LlamaForCausalLM")
    with torch.no_grad():
        for name, form in forms.items():
            plain.get_submodule(name).weight.add_(form.B @ form.A)
    torch.testing.assert_close(tiny.logits(plain), y, rtol=1e-5, atol=1e-5)


def test_two_of_them_add_up() -> None:
    adapters = []
    for _ in range(2):
        model = tiny.seeded("LlamaForCausalLM")
        lorary.attach(model, lorary.plan(model, lorary.method("miss", r=5), "q_proj"))
        for layer in adapted_layers(model).values():
            shake(layer, 0.1)
        adapters.append(lorary.Adapter.of(model))
    mixed = lorary.mix(adapters, [0.5, 2.0])
    base = tiny.seeded("LlamaForCausalLM")
    (a, b), m = (x.low_rank() for x in adapters), mixed.low_rank()
    for name, form in m.items():
        expected = 0.5 * a[name].B @ a[name].A + 2.0 * b[name].B @ b[name].A
        torch.testing.assert_close(form.B @ form.A, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(tiny.logits(lorary.switch(base, mixed))).all()


def test_dropout_acts_before_the_sums() -> None:
    layer = shake(attached(nn.Linear(40, 16), "miss", r=3, dropout=0.5)).train()
    x = torch.randn(7, 40).double()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(x, 0.5)
    exactly(y, layer.base(x) + dropped @ expanded(layer.params["D"], 40).T)


def first_step(name: str, r: int) -> float:
    """How far the first step of AdamW moves the logits of the built-in base."""
    torch.manual_seed(0)
    model, ids = builtin.load_model(), torch.arange(64).reshape(1, 64)
    with torch.no_grad():
        before = model(ids).logits
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=r)))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-5))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        return (model(ids).logits - before).norm().item()


def test_why_the_learning_rates_differ() -> None:
    """At one learning rate MiSS moves the output further than LoRA, and HiRA less far: 2e-5, 2e-4 and 1e-3."""
    assert first_step("miss", 64) > 4 * first_step("lora", 64)
    assert first_step("hira", 32) < first_step("lora", 16) / 4
    rates = [lorary.presets()[name].lr for name in ("miss", "lora", "hira")]
    assert rates == sorted(rates) == [2e-5, 2e-4, 1e-3]


def test_its_names() -> None:
    assert lorary.method("Bone", r=8) == lorary.method("miss", r=8) == lorary.method("DiSHA", r=8)
