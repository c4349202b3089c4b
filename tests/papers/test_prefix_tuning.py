"""Prefix tuning: keys and values before the text's in every layer, trained by themselves or through a network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import lorary
from lorary.errors import MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods.prefix_tuning import PrefixContext

from .. import tiny

L = 4
BASES = ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM"]


def prefixed(name: str = "LlamaForCausalLM", **options: Any) -> Any:
    model = tiny.seeded(name)
    return lorary.attach(model, lorary.plan(model, lorary.method("prefix-tuning", **{"tokens": L} | options)), seed=3)


def through_the_cache(model: Any, name: str, **inputs: Any) -> Tensor:
    """The base's logits with the same prefix as its past keys and values, as in the authors' code."""
    layers: dict[str, dict[str, Tensor]] = {}
    for layer in adapted_layers(lorary.switch(model, lorary.Adapter.of(model).compact())).values():
        layers.setdefault(layer.site.name.rpartition(".")[0], {}).update(layer.params.items())
    base = tiny.seeded(name)
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rows = len(tiny.ids())
    past = [
        tuple(
            roles[role].detach().view(L, heads, -1).transpose(0, 1)[None].expand(rows, -1, -1, -1)
            for role in ("P_k", "P_v")
        )
        for roles in layers.values()
    ]
    mask = inputs.pop("attention_mask", torch.ones(rows, 5, dtype=torch.long))
    mask = torch.cat([torch.ones(rows, L, dtype=torch.long), mask], 1)
    return tiny.logits(base, input_ids=tiny.ids(), past_key_values=DynamicCache(past), attention_mask=mask, **inputs)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [0, 6])
@pytest.mark.parametrize("name", BASES)
def test_it_is_the_base_with_the_prefix_as_its_past_keys_and_values(name: str, mlp: int) -> None:
    model = prefixed(name, mlp=mlp)
    found = tiny.logits(model)
    torch.testing.assert_close(found, through_the_cache(model, name), rtol=1e-5, atol=1e-6)
    assert (found - tiny.logits(tiny.seeded(name))).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_hides_the_text_and_not_the_prefix(padding: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1] if padding == "left" else [1, 1, 1, 0, 0], [1] * 5])
    model = prefixed()
    found = tiny.logits(model, input_ids=tiny.ids(), attention_mask=mask)
    expected = through_the_cache(model, "LlamaForCausalLM", attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


def test_one_layer_is_the_equation_of_the_paper() -> None:
    """softmax(Q [P_k; K]^T / sqrt(d_h)) [P_v; V], written out for GPT-2's first layer."""
    model = prefixed("GPT2LMHeadModel")
    block, ids = model.transformer.h[0], tiny.ids()
    seen: list[Tensor] = []
    block.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        positions = torch.arange(L, L + 5)  # the text begins at position l
        x = block.ln_1(model.transformer.wte(ids) + model.transformer.wpe(positions))
        params = block.attn.c_attn.params
        q, k, v = (part.view(2, 5, 4, 4).transpose(1, 2) for part in block.attn.c_attn.base(x).split(16, 2))
        P_k, P_v = (params[role].view(L, 4, 4).transpose(0, 1).expand(2, 4, L, 4) for role in ("P_k", "P_v"))
        scores = q @ torch.cat([P_k, k], 2).transpose(2, 3) / 2
        hidden = torch.ones(5, L + 5).tril(L) == 0
        o = scores.masked_fill(hidden, -torch.inf).softmax(3) @ torch.cat([P_v, v], 2)
    torch.testing.assert_close(seen[0], o.transpose(1, 2).reshape(2, 5, 16), rtol=1e-5, atol=1e-6)


def test_only_the_prefix_has_a_gradient() -> None:
    model = prefixed()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"P_k", "P_v"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


# --- counts -----------------------------------------------------------------------------------------------------------


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_counts_of_gpt2_medium() -> None:
    """2 L l d = 245,760 of the paper's GPT-2 medium; about 25.7 million while its network trains."""
    medium = meta(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert lorary.plan(medium, lorary.method("prefix", tokens=5)).trainable == 2 * 24 * 5 * 1024 == 245_760
    network = 5 * 1024 + (1024 + 1) * 512 + (512 + 1) * 2 * 24 * 1024
    assert lorary.plan(medium, lorary.method("prefix", tokens=5, mlp=512)).trainable == network == 25_744_896


def test_grouped_heads_need_a_prefix_of_their_width() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=9,
    )
    assert lorary.plan(meta(config), lorary.method("prefix-tuning")).trainable == 2 * 3 * 10 * 16


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES[:2])
def test_without_its_network_it_is_the_same_prefix(name: str) -> None:
    model = tiny.shaken(prefixed(name, mlp=6), 0.1)
    adapter, found = lorary.Adapter.of(model), tiny.logits(model)
    alone = adapter.compact()
    assert alone.method == lorary.method("prefix-tuning", tokens=L)
    assert {role for roles in alone.tensors.values() for role in roles} == {"P_k", "P_v"}
    assert sum(t.numel() for roles in alone.tensors.values() for t in roles.values()) == 2 * 2 * L * (
        8 if "Llama" in name else 16
    )
    lorary.switch(model, alone)
    assert torch.equal(tiny.logits(model), found)
    assert alone.compact() == alone
    assert adapter.tensors.keys() - alone.tensors.keys() == {adapter.sites[0].site.name}


def test_the_network_is_the_papers() -> None:
    """P = tanh(E W1^T + b1) W2^T + b2, with PyTorch's start of an embedding and of two linear layers."""
    model = tiny.seeded("LlamaForCausalLM", hidden_size=64, vocab_size=40)
    lorary.attach(model, lorary.plan(model, lorary.method("prefix", tokens=50, mlp=100)))
    roles = {name: dict(layer.params) for name, layer in adapted_layers(model).items()}
    first, k = roles["model.embed_tokens"], roles["model.layers.1.self_attn.k_proj"]
    assert {role: tuple(t.shape) for role, t in first.items()} == {"E": (50, 64), "W1": (100, 64), "b1": (100,)}
    assert {role: tuple(t.shape) for role, t in k.items()} == {"W_k": (32, 100), "b_k": (32,)}
    assert abs(first["E"].std().item() - 1) < 0.05
    for tensor, inputs in ((first["W1"], 64), (first["b1"], 64), (k["W_k"], 100), (k["b_k"], 100)):
        bound = inputs**-0.5
        assert 0.8 * bound < tensor.abs().max().item() <= bound
    found = lorary.Adapter.of(model).compact().tensors["model.layers.1.self_attn.k_proj"]["P_k"]
    torch.testing.assert_close(found, (first["E"] @ first["W1"].T + first["b1"]).tanh() @ k["W_k"].T + k["b_k"])


# --- the start, kept, taken off ---------------------------------------------------------------------------------------


def test_the_start_follows_the_seed_and_the_deviation() -> None:
    one, other = (tiny.seeded("LlamaForCausalLM") for _ in range(2))
    plan = lorary.plan(one, lorary.method("prefix", tokens=200, std=0.25))
    values = [
        torch.cat(
            [
                t.flatten()
                for layer in adapted_layers(lorary.attach(m, plan, seed=s)).values()
                for t in layer.params.values()
            ]
        )
        for m, s in ((one, 0), (other, 1))
    ]
    assert not torch.equal(*values)
    assert abs(values[0].std().item() - 0.25) < 0.01
    assert abs(values[0].mean().item()) < 0.01


@pytest.mark.parametrize("mlp", [0, 6])
def test_saved_and_loaded_it_is_the_same_bit_for_bit(mlp: int, tmp_path: Path) -> None:
    model = tiny.shaken(prefixed(mlp=mlp), 0.1)
    lorary.save(model, tmp_path / "a")
    again = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "a")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert lorary.Adapter.of(again).method == lorary.Adapter.of(model).method
    lorary.save(again, tmp_path / "b")
    for name in ("adapter.safetensors" if mlp else "adapter_model.safetensors", "lorary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", BASES[:2])
def test_disabled_switched_and_detached_the_base_is_back(name: str) -> None:
    base = tiny.seeded(name)
    plain, before, model = tiny.logits(base), tiny.everything(base), base
    lorary.attach(model, lorary.plan(model, lorary.method("prefix", tokens=L)))
    with_prefix, adapter = tiny.logits(model), lorary.Adapter.of(model)
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), plain)
    assert torch.equal(tiny.logits(model), with_prefix)
    lorary.switch(model, None)
    assert torch.equal(tiny.logits(model), plain)
    lorary.switch(model, adapter)
    assert torch.equal(tiny.logits(model), with_prefix)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), plain)
    assert tiny.everything(model)[1] == before[1]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in tiny.seeded(name).named_modules()]


def test_copies_and_their_prefixes_are_independent() -> None:
    model = prefixed()
    other, found = copy.deepcopy(model), tiny.logits(model)
    assert torch.equal(tiny.logits(other), found)
    tiny.shaken(model)
    assert torch.equal(tiny.logits(other), found)
    assert not torch.equal(tiny.logits(model), found)


def test_any_change_of_the_prefix_is_seen() -> None:
    model = prefixed()
    layer = adapted_layers(model)["model.layers.0.self_attn.k_proj"]
    before = tiny.logits(model)
    layer.params["P_k"].data = layer.params["P_k"].data + 1
    changed = tiny.logits(model)
    assert not torch.equal(changed, before)
    with lorary.cached(model):
        tiny.logits(model)
        layer.params["P_k"].data.sub_(1)
        torch.testing.assert_close(tiny.logits(model), before)


# --- beside other methods ---------------------------------------------------------------------------------------------


def test_lora_trains_beside_it() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    method = {"attention-kv": lorary.method("prefix", tokens=L), "mlp": lorary.method("lora", r=2)}
    lorary.attach(model, lorary.plan(model, method))
    alone = prefixed()
    for name, layer in adapted_layers(alone).items():
        layer.load(dict(adapted_layers(model)[name].params))
    assert torch.equal(tiny.logits(model), tiny.logits(alone))
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"P_k", "P_v", "A", "B"}


def test_a_quantised_base_has_a_prefix_too() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "prefix", tokens=L)))
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {"P_k", "P_v"}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "join: Prefix has tokens = 0; it takes a whole number of at least 1"),
        ({"tokens": True}, "join: Prefix has tokens = True; it takes a whole number of at least 1"),
        ({"mlp": -1}, "join: Prefix has mlp = -1; it takes a whole number of at least 0"),
        ({"std": float("nan")}, "join: Prefix has std = nan; it takes a positive finite number"),
        ({"dropout": 0.1}, "dropout: Prefix adds no update whose input dropout could act on"),
        ({"r": 4}, "r: prefix-tuning sets NoUpdate(), which has no rank"),
        ({"alpha": 4}, "alpha: prefix-tuning sets ConstantScale(s=1.0), which has no alpha"),
        ({"length": 4}, "length: is not an option of lora + prefix-tuning"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError) as refused:
        lorary.method("prefix-tuning", **options)
    assert said in str(refused.value)


def test_without_its_context_it_would_do_nothing() -> None:
    with pytest.raises(MethodError, match="context: is missing: Prefix takes effect through it"):
        lorary.method("prefix-tuning").replace(context=None)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            "k_proj",
            "targets: a prefix stands before the keys and the values of every attention layer; here not at "
            "model.layers.0.self_attn, model.layers.1.self_attn",
        ),
        ("model.layers.0.self_attn.[kv]_proj", "matches no layer"),
        (
            ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"],
            "here not at model.layers.1.self_attn",
        ),
        ("q_proj", "model.layers.0.self_attn.q_proj: is not a projection of keys or values"),
        ("embedding", "model.embed_tokens: is not a projection of keys or values"),
    ],
)
def test_other_targets(targets: Any, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        lorary.plan(tiny.llama(), lorary.method("prefix-tuning"), targets)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("BertForMaskedLM", "context: BertForMaskedLM is not a causal language model with a cache of keys and values"),
        ("T5ForConditionalGeneration", "has an encoder and a decoder; only causal language models are supported"),
        ("BloomForCausalLM", "BloomForCausalLM does not use Transformers' attention interface"),
        ("ViTForImageClassification", "ViTForImageClassification is not a causal language model"),
    ],
)
@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning"])
def test_models_that_cannot_have_one(name: str, said: str, method: str) -> None:
    with pytest.raises(PlanError) as refused:
        lorary.plan(tiny.model(name, "meta"), lorary.method(method))
    assert said in str(refused.value)


def test_mamba_has_no_keys() -> None:
    with torch.device("meta"):
        mamba = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
        )
    with pytest.raises(
        PlanError, match="MambaForCausalLM is not a causal language model with a cache of keys and values"
    ):
        lorary.plan(mamba, lorary.method("prompt-tuning"))


def test_a_plain_module_is_no_language_model() -> None:
    with pytest.raises(PlanError, match="Sequential is not a Transformers model"):
        lorary.plan(torch.nn.Sequential(torch.nn.Linear(4, 4)), lorary.method("prefix-tuning"))


def test_more_tokens_than_positions() -> None:
    with pytest.raises(PlanError, match="takes 2,048 positions, and LlamaForCausalLM has 2,048"):
        lorary.plan(tiny.llama(), lorary.method("prefix-tuning", tokens=2048))


def test_a_context_of_another_length_than_the_prefix() -> None:
    method = lorary.method("prefix-tuning", tokens=L).replace(context=PrefixContext(L + 1))
    with pytest.raises(PlanError, match="targets: 4 tokens stand before the text, and the context has room for 5"):
        lorary.plan(tiny.llama(), method)


def test_it_is_never_merged(tmp_path: Path) -> None:
    model = prefixed()
    with pytest.raises(StateError, match="Prefix stands before the text, which no weight and bias can"):
        lorary.merge(model)
    with pytest.raises(MethodError, match="stands before the text"):
        lorary.Adapter.of(model).low_rank(tiny.seeded("LlamaForCausalLM"))
    assert torch.equal(tiny.logits(model), tiny.logits(prefixed()))


def test_the_plan_says_what_is_taken() -> None:
    plan = lorary.plan(tiny.llama(), lorary.method("prefix-tuning"))
    assert "takes 10 positions before the text: of 2,048 positions, 2,038 are left for the text" in plan.notes


@pytest.mark.parametrize(
    ("name", "layers"), [("MistralForCausalLM", 1), ("Gemma2ForCausalLM", 2), ("Gemma3ForCausalLM", 2)]
)
def test_a_sliding_window_sees_the_prefix_at_any_distance(name: str, layers: int) -> None:
    model = tiny.seeded(name, sliding_window=2, num_hidden_layers=layers)
    plan = lorary.plan(model, lorary.method("prefix", tokens=L))
    assert any("with a sliding window of 2 tokens see the prefix at any distance" in note for note in plan.notes)
    lorary.attach(model, plan)
    model(tiny.ids()).logits[:, -1].square().sum().backward()  # of the last token, five behind the prefix
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(model.generate(tiny.ids(), **words), model.generate(tiny.ids(), **words, use_cache=False))


def test_without_its_network_beside_lora() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    prefix = lorary.method("prefix", tokens=L, mlp=6)
    lorary.attach(model, lorary.plan(model, {"mlp": lorary.method("lora", r=2), ("embedding", "attention-kv"): prefix}))
    tiny.shaken(model, 0.1)
    found = tiny.logits(model)
    lorary.switch(model, lorary.Adapter.of(model).compact())
    torch.testing.assert_close(tiny.logits(model), found)
