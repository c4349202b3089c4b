"""HiRA: the weight times one plus a low-rank matrix, element by element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import lorary
from lorary.analysis.importance import layer_importance
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.quantized_weight import is_quantized

from .. import tiny
from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature


def equation(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W0 + W0 * (B A), one element after the other (equation 6)."""
    rows = [torch.stack([w * (1 + p["B"][i] @ p["A"][:, j]) for j, w in enumerate(row)]) for i, row in enumerate(W)]
    return torch.stack(rows)


@EACH_EVEN
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "hira"), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@EACH_EVEN
def test_the_first_gradients(make: Any, x: Any) -> None:
    """One factor starts at zero and the other does not (section 4.3), so that the first one learns alone."""
    layer = attached(make(), "hira")
    table = layer.site.kind == "embedding"
    assert signature(layer, x()) == ({"A": "some", "B": "zero"} if table else {"A": "zero", "B": "some"})


def test_the_start_is_kaimings() -> None:
    A = attached(nn.Linear(256, 64), "hira", r=32).params["A"]
    assert 0.97 / math.sqrt(256) < A.abs().max() <= 1 / math.sqrt(256)


@EACH_EVEN
def test_it_is_the_papers_equation(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "hira", r=2)), x()
    W = matrix(layer)
    same_function(layer, inputs, equation(W, {role: p.detach() for role, p in layer.params.items()}))
    exactly(gradients(layer, inputs), dense_gradients(layer, inputs, lambda p: equation(W, p)))
    exactly(layer.merged()[0], equation(W, {role: p.detach() for role, p in layer.params.items()}))


def test_the_parts_of_a_fused_weight_have_factors_of_their_own() -> None:
    model = tiny.seeded("GPT2LMHeadModel").double()
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2), "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["transformer.h.0.attn.c_attn"])
    B, A, W = layer.params["B"].detach(), layer.params["A"].detach(), matrix(layer)
    assert (B.shape, A.shape) == ((32, 2), (4, 16))
    q, v = (W[rows] * (1 + B[part] @ A[two]) for rows, part, two in CUTS)
    exactly(layer.merged()[0], torch.cat([q, W[16:32], v]))
    same_function(layer, torch.randn(3, 16).double(), torch.cat([q, W[16:32], v]))


CUTS = [(slice(0, 16), slice(0, 16), slice(0, 2)), (slice(32, 48), slice(16, 32), slice(2, 4))]


def llama_3_8b() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def llama_2_7b() -> Any:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "r", "expected", "percent"),
    [
        (llama_3_8b, 16, 28_311_552, "0.3513"),
        (llama_3_8b, 32, 56_623_104, "0.7002"),
        (llama_2_7b, 32, 56_098_816, "0.8256"),
    ],
)
def test_the_papers_counts(make: Any, r: int, expected: int, percent: str) -> None:
    """Tables 1 and 2: LoRA's numbers, as a share of the model with them."""
    model, targets = make(), ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    trained = lorary.plan(model, lorary.method("hira", r=r), targets).trainable
    assert trained == expected == lorary.plan(model, lorary.method("lora", r=r), targets).trainable
    assert f"{100 * trained / (trained + sum(p.numel() for p in model.parameters())):.4f}" == percent


@pytest.mark.parametrize(("rank", "r", "expected"), [(12, 1, 12), (2, 1, 2), (2, 3, 6), (3, 2, 6), (12, 2, 12)])
def test_the_rank_of_the_update_is_up_to_that_of_the_weight_times_r(rank: int, r: int, expected: int) -> None:
    layer = attached(nn.Linear(12, 16), "hira", r=r)
    with torch.no_grad():
        layer.base.weight.copy_(torch.randn(16, rank).double() @ torch.randn(rank, 12).double())
    update = shake(layer).merged()[0] - matrix(layer)
    assert torch.linalg.matrix_rank(update) == expected


def test_a_zero_of_the_weight_stays() -> None:
    layer = attached(nn.Linear(12, 16), "hira")
    with torch.no_grad():
        layer.base.weight[layer.base.weight > 0] = 0
    W = shake(layer).merged()[0]
    assert torch.equal(W == 0, matrix(layer) == 0)


def test_it_is_gloras_term_a() -> None:
    base = nn.Linear(12, 16)
    layer = shake(attached(base, "hira", r=2))
    x, p = torch.randn(5, 12).double(), {role: t.detach().clone() for role, t in layer.params.items()}
    method = lorary.method("glora", r=2, B="none", C="none", D="none", E="none")
    model = nn.Sequential(base)
    lorary.attach(model, lorary.plan(model, method, "0"), dtype=torch.float64)
    with torch.no_grad():
        model[0].params["Ad"].copy_(p["B"])
        model[0].params["Au"].copy_(p["A"])
    assert torch.equal(model(x), layer(x))


def test_an_element_that_a_merge_has_erased_comes_back() -> None:
    """The paper divides by 1 + B A, which is 0 here."""
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.clone()
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=1), "0"))
    with torch.no_grad():
        model[0].params["A"].fill_(1.0)
        model[0].params["B"].fill_(-1.0)
    lorary.merge(model, keep=True)
    assert not model[0].weight.any()
    lorary.unmerge(model)
    assert torch.equal(model[0].base.weight, before)


def test_dropout_acts_on_the_input_of_the_update_alone() -> None:
    layer = shake(attached(nn.Linear(40, 16), "hira", dropout=0.5)).train()
    x = torch.randn(7, 40).double()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    exactly(y, layer.base(x) + dropped @ (layer.merged()[0] - matrix(layer)).T)
    table = shake(attached(nn.Embedding(9, 4), "hira", dropout=0.5)).train()  # no dropout of token ids
    ids = torch.tensor([1, 3])
    exactly(table(ids), table.eval()(ids))


# --- the base in 4 bits, and in 16 -----------------------------------------------------------------------------------


def packed(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[Adapted, Tensor]:
    """A trained HiRA on a layer in NF4, and inputs for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64)).to(dtype)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "hira", r=2, dropout=dropout), "0"))
    layer = adapted_layers(model)["0"]
    assert is_quantized(layer.base)
    return shake(layer, 0.3), torch.randn(6, 128, dtype=dtype, requires_grad=True)


def test_a_base_in_4_bits_is_scaled_from_its_codes() -> None:
    layer, x = packed()
    W, B, A = layer.matrix, layer.params["B"], layer.params["A"]
    y = layer(x)
    expected = F.linear(x, W + W * (B @ A), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(y)
    got, exact = (torch.autograd.grad(out, (x, B, A), g) for out in (y, expected))
    for mine, other in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("sort", ["fp32", "bf16", "nf4"])
def test_nothing_of_the_weights_size_is_kept_for_backward(sort: str, dropout: float) -> None:
    """Of a quantised base not even the weight, and of a dense one the weight that is there anyway."""
    if sort == "nf4":
        layer, x = packed(dropout=dropout)
    else:
        dtype = torch.float32 if sort == "fp32" else torch.bfloat16
        model = nn.Sequential(nn.Linear(128, 64)).to(dtype)
        lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2, dropout=dropout), "0"))
        layer, x = shake(adapted_layers(model)["0"]), torch.randn(6, 128, dtype=dtype, requires_grad=True)
    layer.train()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    own = {t.data_ptr() for t in (*layer.base.parameters(), *layer.base.buffers())}
    assert max((t.numel() for t in kept if t.data_ptr() not in own), default=0) <= 6 * 128
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.params.values())


def test_a_model_in_4_bits_trains_and_merges() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "hira", r=2)))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(5):
        loss = model(tiny.ids(), labels=tiny.ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    y = tiny.logits(model)
    lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model), y, rtol=1e-4, atol=1e-4)


# --- what has no low-rank form ---------------------------------------------------------------------------------------


def trained() -> lorary.Adapter:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2), "q_proj"))
    for layer in adapted_layers(model).values():
        shake(layer, 0.1)
    return lorary.Adapter.of(model)


NAME = "model.layers.0.self_attn.q_proj"
FULL = "W * (B A) has a rank far above r: HiRA is not a low-rank change of W with a gain for every output"


def test_what_asks_for_a_low_rank_form_is_refused() -> None:
    adapter, base = trained(), tiny.seeded("LlamaForCausalLM")
    with pytest.raises(lorary.errors.MethodError) as refusal:
        adapter.low_rank(base)
    assert f"{NAME} and 1 more: {FULL}\n      hint: merge it into the base" in str(refusal.value)
    with pytest.raises(lorary.errors.MethodError):
        lorary.mix([adapter, adapter])
    with pytest.raises(lorary.errors.MethodError) as refused:
        lorary.change_rank(adapter, 1)
    assert "HadamardFactors" in str(refused.value)


def test_drop_is_refused_as_the_update_is_another_one() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2), "q_proj"))
    with pytest.raises(lorary.errors.PlanError, match="TimesWeight changes a layer's output by more than s B A x"):
        layer_importance(model, [tiny.ids()])
