"""(IA)³: three vectors of each block, which rescale keys, values and the inputs of the feed-forward block's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorary
from lorary.errors import MethodError, StateError
from lorary.layers.adapted import adapted_layers

from .. import tiny


def trained(model: Any, *presets: str, seed: int = 0, **options: Any) -> Any:
    """The model with an (IA)³ whose vectors have moved."""
    targets = options.pop("targets", None)
    lorary.attach(model, lorary.plan(model, lorary.method("ia3", *presets, **options), targets))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for vector in layer.params.values():
                vector.add_(torch.randn_like(vector) * 0.2)
    return model


def t5(**sizes: Any) -> Any:
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.device("meta"):
        return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        # T0-3B, the paper's model: T5 1.1 of 3B parameters
        ({"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}, 540_672),
        # mt0-large, in PEFT's documentation
        ({"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16}, 282_624),
    ],
)
def test_counts_of_encoder_decoders(sizes: dict[str, int], count: int) -> None:
    """L (d_k + d_v + d_ff) in the encoder; in the decoder another d_k + d_v for the cross attention."""
    plan = lorary.plan(t5(**sizes), lorary.method("ia3"))
    L, inner, ff = sizes["num_layers"], sizes["d_kv"] * sizes["num_heads"], sizes["d_ff"]
    assert plan.trainable == count == L * (2 * inner + ff) + L * (4 * inner + ff)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("LlamaForCausalLM", {"self_attn.k_proj": "l", "self_attn.v_proj": "l", "mlp.down_proj": "l_ff"}),
        ("GPT2LMHeadModel", {"attn.c_attn": "l", "mlp.c_proj": "l_ff"}),
        ("GPTNeoXForCausalLM", {"attention.query_key_value": "l", "mlp.dense_4h_to_h": "l_ff"}),
        ("Phi3ForCausalLM", {"self_attn.qkv_proj": "l", "mlp.down_proj": "l_ff"}),
        ("BertForSequenceClassification", {"self.key": "l", "self.value": "l", "output.dense": "l_ff"}),
        ("DistilBertForSequenceClassification", {"attention.k_lin": "l", "attention.v_lin": "l", "ffn.lin2": "l_ff"}),
        ("ModernBertForMaskedLM", {"attn.Wqkv": "l", "mlp.Wo": "l_ff"}),
        ("BartForConditionalGeneration", {"k_proj": "l", "v_proj": "l", "fc2": "l_ff"}),
        ("ViTForImageClassification", {"k_proj": "l", "v_proj": "l", "fc2": "l_ff"}),
    ],
)
def test_the_layers_by_their_names(name: str, sites: dict[str, str]) -> None:
    plan = lorary.plan(tiny.model(name, "meta"), lorary.method("ia3"))
    found = {p.site.name: next(iter(p.shapes)) for p in plan.sites}
    assert {role for path, role in found.items()} == {"l", "l_ff"}
    for path, role in found.items():
        assert any(f".{path}".endswith(f".{end}") and role == expected for end, expected in sites.items()), path
    assert all(any(f".{path}".endswith(f".{end}") for path in found) for end in sites)
    fused = [p.site for p in plan.sites if p.site.parts]
    assert all([part.name for part in site.parts] == ["k", "v"] for site in fused)


def test_outputs_and_inputs_are_scaled() -> None:
    model = nn.ModuleDict({"k_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)})
    x, h = torch.randn(3, 4), torch.randn(3, 6)
    k, down = (nn.Linear(4, 6), nn.Linear(6, 4))
    k.load_state_dict(model.k_proj.state_dict())
    down.load_state_dict(model.down_proj.state_dict())
    plan = lorary.plan(model, lorary.method("ia3", feed_forward=["down_proj"]), ["k_proj", "down_proj"])
    lorary.attach(model, plan)
    assert torch.equal(model.k_proj(x), k(x))
    assert torch.equal(model.down_proj(h), down(h))
    with torch.no_grad():
        l = model.k_proj.params["l"].copy_(torch.randn(6))  # noqa: E741 (the paper's letter)
        l_ff = model.down_proj.params["l_ff"].copy_(torch.randn(6))
    torch.testing.assert_close(model.k_proj(x), l * k(x))
    torch.testing.assert_close(model.down_proj(h), down(l_ff * h))
    W, b = model.k_proj.merged()
    assert torch.equal(W, l[:, None] * k.weight)
    assert torch.equal(b, l * k.bias)
    W, b = model.down_proj.merged()
    assert torch.equal(W, down.weight * l_ff)
    assert torch.equal(b, down.bias)


def test_the_queries_of_a_fused_weight_stay() -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    plain = model.transformer.h[0].attn.c_attn
    x = torch.randn(2, 16)
    before = plain(x)
    y = trained(model).transformer.h[0].attn.c_attn(x)
    assert torch.equal(y[:, :16], before[:, :16])
    assert not torch.isclose(y[:, 16:], before[:, 16:]).all(0).any()
    lorary.merge(model)
    torch.testing.assert_close(model.transformer.h[0].attn.c_attn(x), y)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_merged_and_back(name: str) -> None:
    model = tiny.seeded(name)
    inputs = {"input_ids": tiny.ids()} | ({"decoder_input_ids": tiny.ids()} if "T5" in name else {})
    plain = tiny.logits(model, **inputs)
    lorary.attach(model, lorary.plan(model, lorary.method("ia3")))
    assert torch.equal(tiny.logits(model, **inputs), plain), "it starts exactly at the base"
    lorary.detach(model)
    y = tiny.logits(trained(model), **inputs)
    assert not torch.allclose(y, plain)
    lorary.merge(model, keep=True)
    torch.testing.assert_close(tiny.logits(model, **inputs), y, rtol=1e-5, atol=1e-6)
    lorary.unmerge(model)
    assert torch.equal(tiny.logits(model, **inputs), y)
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model, **inputs), plain)


def test_a_quantised_base_trains_under_it() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "ia3")))
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(v.grad is not None and v.grad.any() for m in adapted_layers(model).values() for v in m.params.values())


def test_small_changes_survive_a_base_in_16_bits() -> None:
    """1 + 2^-12 is 1 in bfloat16; times a number that is not rounded itself it is not nothing everywhere."""
    layer = nn.Linear(64, 512).to(torch.bfloat16)
    model = nn.ModuleDict({"k_proj": layer})
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    before = layer(x)
    lorary.attach(model, lorary.plan(model, lorary.method("ia3"), "k_proj"))
    with torch.no_grad():
        model.k_proj.params["l"].fill_(1 + 2**-8 + 2**-12)
    after = model.k_proj(x)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)
    assert torch.equal(after, (before.float() * (1 + 2**-8 + 2**-12)).to(torch.bfloat16))


def test_no_decay_pulls_the_vectors_to_zero() -> None:
    model = trained(tiny.llama())
    assert [group["weight_decay"] for group in lorary.param_groups(model, lr=1.0, weight_decay=0.1)] == [0.0]


def test_biases_train_under_their_factor() -> None:
    """With BitFit, b' = l * b of the trained b."""
    model = tiny.seeded("Qwen2ForCausalLM")
    trained(model, "bitfit")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    y = tiny.logits(model)
    layer = next(m for n, m in adapted_layers(model).items() if n.endswith("k_proj"))
    assert torch.equal(layer.merged()[1], layer.params["l"] * layer.bias)
    lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model), y)


def test_a_model_without_such_layers_is_refused_with_its_layers() -> None:
    with pytest.raises(lorary.errors.PlanError) as refusal:
        lorary.plan(nn.Sequential(nn.Linear(4, 4)), lorary.method("ia3"))
    text = str(refusal.value)
    assert text.startswith("invalid plan:\n  - targets: `attention-kv` matches no layer of this model")
    assert "targets: `mlp-output` matches no layer of this model" in text
    assert "Linear 4x4" in text


def test_its_low_rank_form_is_a_gain_where_outputs_are_scaled() -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    adapter = lorary.Adapter.of(trained(model, targets=["c_attn[k,v]"]))
    form = adapter.low_rank(tiny.seeded("GPT2LMHeadModel"))["transformer.h.0.attn.c_attn"]
    assert form.A.shape == (0, 16)
    assert torch.equal(form.gain[:16], torch.ones(16))
    whole = lorary.Adapter.of(trained(tiny.seeded("GPT2LMHeadModel")))
    with pytest.raises(MethodError, match=r"l_ff|scales the inputs: W diag\(l_ff\) - W has full rank"):
        whole.low_rank(tiny.seeded("GPT2LMHeadModel"))


def test_what_asks_for_a_rank_is_refused() -> None:
    adapter = lorary.Adapter.of(trained(tiny.llama()))
    with pytest.raises(MethodError) as refusal:
        lorary.change_rank(adapter, 4)
    assert str(refusal.value) == (
        "cannot change the rank of this adapter:\n"
        "  - join: Rescaling has no rank: its change is not a sum of directions"
    )
    with pytest.raises(lorary.errors.PlanError) as refused:
        lorary.plan(tiny.llama(), lorary.method("ia3"), ranks={"k_proj": 4}, alphas={"v_proj": 2})
    assert str(refused.value) == (
        "invalid plan:\n"
        "  - alphas: ConstantScale(s=1.0) has no alpha\n      hint: leave them out\n"
        "  - ranks: Rescaling has no rank\n      hint: leave them out"
    )


def test_two_of_them_differ_in_their_vectors() -> None:
    one, other = (lorary.Adapter.of(trained(tiny.seeded("LlamaForCausalLM"), seed=seed)) for seed in (0, 1))
    found = lorary.diff(one, other)
    assert str(found).startswith("6 common sites, without updates of low rank\n6 sites differ in other tensors, most")
    assert {role for site in found.sites for role in site.others} == {"l", "l_ff"}
    assert lorary.diff(one, one).identical


def test_nothing_that_is_not_finite_is_merged() -> None:
    model = trained(tiny.llama())
    layer = next(iter(adapted_layers(model).values()))
    with torch.no_grad():
        layer.params["l"][0] = float("inf")
    with pytest.raises(StateError, match="merged, the weight is not finite"):
        lorary.merge(model)
    assert adapted_layers(model)


def test_its_names() -> None:
    assert {str(lorary.method(name)) for name in ("IA3", "ia-3", "(IA)3", "(ia)³")} == {str(lorary.method("ia3"))}
    assert {str(lorary.method(name)) for name in ("adapters", "Bottleneck", "houlsby adapters")} == {
        str(lorary.method("houlsby"))
    }
