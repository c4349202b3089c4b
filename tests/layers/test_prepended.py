"""Keys and values before the text's: in training, in generation, in batches of every form."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorary
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from tests import tiny

NO_DROPOUT = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
METHODS: dict[str, lorary.Method] = {
    "prefix": lorary.method("prefix-tuning", tokens=4),
    "prefix of a network": lorary.method("prefix-tuning", tokens=4, mlp=6),
    "prompt": lorary.method("prompt-tuning", tokens=4),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
BOTH = pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])


def base(name: str = "LlamaForCausalLM", attention: str = "sdpa") -> Any:
    model = tiny.seeded(name, **(NO_DROPOUT if name.startswith("GPT2") else {}))
    model.set_attn_implementation(attention)
    return model


def attached(method: lorary.Method, name: str = "LlamaForCausalLM", attention: str = "sdpa") -> Any:
    model = base(name, attention)
    return lorary.attach(model, lorary.plan(model, method), seed=3)


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


# --- training ---------------------------------------------------------------------------------------------------------


@EACH
@BOTH
def test_gradient_checkpointing_changes_nothing(method: lorary.Method, name: str) -> None:
    model = attached(method, name)
    model.activation_checkpointing_enable()
    same(gradients(model), gradients(attached(method, name)))


@EACH
def test_reentrant_checkpointing_is_refused(method: lorary.Method) -> None:
    model = attached(method)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(StateError, match="checkpointing: computes layers again in a backward pass of their own"):
        gradients(model)
    assert torch.equal(tiny.logits(model.eval()), tiny.logits(attached(method)))


@EACH
@BOTH
def test_eager_attention_computes_the_same(method: lorary.Method, name: str) -> None:
    eager = attached(method, name, "eager")
    torch.testing.assert_close(tiny.logits(eager), tiny.logits(attached(method, name)), rtol=1e-5, atol=1e-6)
    same(gradients(eager), gradients(attached(method, name)))


@EACH
def test_packed_rows_each_see_what_stands_before_the_text(method: lorary.Method) -> None:
    model = attached(method)
    packed, positions = tiny.ids().reshape(1, -1), torch.arange(5).repeat(2)[None]
    found = tiny.logits(model, input_ids=packed, position_ids=positions, use_cache=False)
    torch.testing.assert_close(found.reshape(2, 5, -1), tiny.logits(model), rtol=1e-5, atol=1e-6)


@EACH
def test_a_mask_of_four_dimensions_is_the_texts(method: lorary.Method) -> None:
    model, mask = attached(method), torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    found = tiny.logits(model, input_ids=tiny.ids(), attention_mask=mask)
    torch.testing.assert_close(found, tiny.logits(model), rtol=1e-5, atol=1e-6)


@EACH
def test_in_16_bits_it_follows_the_base(method: lorary.Method) -> None:
    half = base().bfloat16()
    lorary.attach(half, lorary.plan(half, method), seed=3)
    assert {p.dtype for layer in adapted_layers(half).values() for p in layer.params.values()} == {torch.float32}
    torch.testing.assert_close(tiny.logits(half).float(), tiny.logits(attached(method)), rtol=0.05, atol=0.02)


@EACH
def test_compiles_whole(method: lorary.Method) -> None:
    model = tiny.seeded("LlamaForCausalLM", num_hidden_layers=1)
    lorary.attach(model, lorary.plan(model, method))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert torch.equal(tiny.logits(compiled), tiny.logits(model))


# --- generation -------------------------------------------------------------------------------------------------------


@EACH
@BOTH
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generated_with_a_cache_as_without(method: lorary.Method, name: str, options: dict[str, Any]) -> None:
    model = attached(method, name)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(tiny.ids(), **words, **options)
        assert torch.equal(found, model.generate(tiny.ids(), **words, **beams, use_cache=False))


@EACH
@BOTH
def test_a_padded_batch_generates_as_each_row_alone(method: lorary.Method, name: str) -> None:
    model, ids = attached(method, name), tiny.ids()
    rows = torch.stack([torch.tensor([0, 0, *ids[0, :3]]), ids[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    words = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(rows, attention_mask=mask, **words)[:, 5:]
        alone = [
            model.generate(row, attention_mask=torch.ones_like(row), **words)[0, row.shape[1] :]
            for row in (ids[:1, :3], ids[1:])
        ]
    assert torch.equal(found, torch.stack(alone))


@EACH
def test_a_text_in_parts_through_the_cache(method: lorary.Method) -> None:
    model, ids, cache = attached(method), tiny.ids(), transformers.DynamicCache()
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 2), (2, 3), (3, 5))]
    torch.testing.assert_close(torch.cat(parts, 1), tiny.logits(model), rtol=1e-5, atol=1e-6)
    assert cache.get_seq_length() == 5  # the text's own


def test_opt_counts_positions_without_padding() -> None:
    config = transformers.OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        dropout=0,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    lorary.attach(model, lorary.plan(model, METHODS["prompt"]))
    ids, mask = tiny.ids(), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    found = tiny.logits(model, input_ids=ids, attention_mask=mask)
    alone = tiny.logits(model, input_ids=ids[:1, 2:])
    torch.testing.assert_close(found[:1, 2:], alone, rtol=1e-5, atol=1e-6)


# --- the change of the model ------------------------------------------------------------------------------------------


@EACH
def test_pickled_and_copied_it_computes_the_same(method: lorary.Method) -> None:
    model = attached(method)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(tiny.logits(other), tiny.logits(model))


def test_another_model_of_the_same_configuration_keeps_its_attention() -> None:
    one, config = base(), base().config
    one.config = one.model.config = config
    for layer in one.model.layers:
        layer.self_attn.config = config
    lorary.attach(one, lorary.plan(one, METHODS["prefix"]))
    assert config._attn_implementation == "sdpa"


@EACH
def test_another_attention_after_attaching_is_refused(method: lorary.Method) -> None:
    model = attached(method)
    model.set_attn_implementation("eager")
    with pytest.raises(StateError, match="attention: is 'eager', and 'lorary_prepended_4_sdpa' puts the 4 keys"):
        tiny.logits(model)


def test_a_layer_that_nothing_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an architecture that does not hand keywords on to its attention: never in silence."""
    model = attached(METHODS["prefix"])
    block = model.model.layers[1]
    forward = block.self_attn.forward
    monkeypatch.setattr(
        block.self_attn, "forward", lambda *args, lorary_prepended=None, **options: forward(*args, **options)
    )
    with pytest.raises(StateError, match="LlamaAttention: gets no keyword arguments from the model's forward pass"):
        tiny.logits(model)


def test_a_flash_kernel_takes_no_such_mask() -> None:
    model = base()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(lorary.errors.PlanError, match="its attention is 'flash_attention_2'") as refused:
        lorary.plan(model, METHODS["prefix"])
    assert "load the model with attn_implementation='sdpa'" in str(refused.value)
