"""Prompt tuning: trained embeddings before the text's, at the input alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorary
from lorary.errors import MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from tests.train.small import tokenizer

from .. import tiny

L = 4
BASES = ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen3ForCausalLM"]


def prompted(name: str = "LlamaForCausalLM", seed: int = 3, **options: Any) -> Any:
    model = tiny.seeded(name)
    return lorary.attach(
        model, lorary.plan(model, lorary.method("prompt-tuning", **{"tokens": L} | options)), seed=seed
    )


def start(model: Any) -> Tensor:
    """P [l, d]."""
    (layer,) = adapted_layers(model).values()
    return layer.params["P"].detach()


def in_one_sequence(name: str, P: Tensor, mask: Tensor | None = None) -> Tensor:
    """The base's logits of the text in [P; E(x)], the equation of the paper."""
    base, ids = tiny.seeded(name), tiny.ids()
    with torch.no_grad():
        embedded = torch.cat([P.expand(2, -1, -1), base.get_input_embeddings()(ids)], 1)
        if mask is not None:
            mask = torch.cat([torch.ones(2, len(P), dtype=torch.long), mask], 1)
        logits: Tensor = base(inputs_embeds=embedded, attention_mask=mask).logits
    return logits[:, len(P) :]


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_it_is_the_base_on_the_prompt_and_the_text(name: str) -> None:
    model = prompted(name)
    found = tiny.logits(model)
    assert found.shape == (2, 5, 40)
    torch.testing.assert_close(found, in_one_sequence(name, start(model)), rtol=1e-5, atol=1e-6)
    assert (found - tiny.logits(tiny.seeded(name))).abs().max() > 1e-2


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_hides_the_text_and_not_the_prompt(padding: str) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1] if padding == "left" else [1, 1, 1, 0, 0], [1] * 5])
    model = prompted()
    found = tiny.logits(model, input_ids=tiny.ids(), attention_mask=mask)
    expected = in_one_sequence("LlamaForCausalLM", start(model), mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-6)


def test_its_gradient_is_that_of_the_whole_sequence() -> None:
    model, base, ids = prompted(), tiny.seeded("LlamaForCausalLM"), tiny.ids()
    model(ids, labels=ids).loss.backward()
    (layer,) = adapted_layers(model).values()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"model.embed_tokens.params.P"}
    P = start(model).clone().requires_grad_()
    embedded = torch.cat([P.expand(2, -1, -1), base.get_input_embeddings()(ids)], 1)
    labels = torch.cat([torch.full((2, L), -100), ids], 1)
    logits = base(inputs_embeds=embedded).logits[:, L:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, L + 1 :].flatten()).backward()
    torch.testing.assert_close(layer.params["P"].grad, P.grad, rtol=1e-4, atol=1e-7)


def test_the_prompt_is_computed_once_for_a_batch_and_once_for_a_generated_text() -> None:
    model, rows = prompted(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:2])))
    tiny.logits(model)
    assert rows == [(1, L), (2, 5)]
    rows.clear()
    with torch.no_grad():
        model.generate(tiny.ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert rows == [(1, L), (2, 5), (2, 1), (2, 1)]


def test_a_cache_that_another_model_has_filled_is_not_trusted() -> None:
    """The prompt kept beside a text's keys and values belongs to the model that computed them."""
    one, other = prompted(), prompted(seed=5)
    ids = tiny.ids()
    with torch.no_grad():
        cache = transformers.DynamicCache()
        one(ids[:, :3], past_key_values=cache)
        mixed = other(ids[:, 3:], past_key_values=cache).logits
        cache = transformers.DynamicCache()
        one(ids[:, :3], past_key_values=cache)
        own = one(ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(own, tiny.logits(one)[:, 3:])
    assert not torch.equal(mixed, own)


# --- the start --------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    """l d: 409,600 for 100 tokens of T5-XXL's 4,096 dimensions."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, vocab_size=32128
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert lorary.plan(model, lorary.method("prompt-tuning", tokens=100)).trainable == 100 * 4096 == 409_600
    assert lorary.presets()["prompt-tuning"].lr == 0.3


def test_from_the_most_common_embeddings_without_repetition() -> None:
    model = tiny.seeded("LlamaForCausalLM", vocab_size=6000)
    lorary.attach(model, lorary.plan(model, lorary.method("prompt", tokens=300)))
    table = model.get_input_embeddings().base.weight
    found = (start(model)[:, None] == table[None]).all(2).nonzero()
    assert found[:, 0].tolist() == list(range(300))
    assert len(set(found[:, 1].tolist())) == 300
    assert found[:, 1].max() < 5000
    assert found[:, 1].max() > 4500


def test_more_tokens_than_the_vocabulary_repeat() -> None:
    model = prompted(tokens=100)
    table = model.get_input_embeddings().base.weight
    found = (start(model)[:, None] == table[None]).all(2).nonzero()[:, 1]
    counts = found.bincount(minlength=40)
    assert (counts.min(), counts.max()) == (2, 3)


def test_uniform() -> None:
    P = start(prompted(tokens=300, start="uniform"))
    assert 0.49 < P.max().item() < 0.5
    assert -0.5 < P.min().item() < -0.49
    assert abs(P.mean().item()) < 0.02


@pytest.mark.parametrize("tokens", [3, 20])
def test_from_a_text_repeated_or_cut(tokens: int) -> None:
    words = tokenizer()
    method = lorary.method("prompt-tuning", tokens=tokens, init_text="hello world, the answer is two")
    ids = words("hello world, the answer is two", add_special_tokens=False)["input_ids"]
    model = tiny.seeded("LlamaForCausalLM", vocab_size=300)
    lorary.attach(model, lorary.plan(model, lorary.with_prompt_text(method, words)))
    expected = (ids * tokens)[:tokens]
    assert torch.equal(start(model), model.get_input_embeddings().base.weight[expected])
    assert len(ids) not in (3, 20)


def test_other_methods_have_no_text() -> None:
    for method in (lorary.method("lora"), lorary.method("prompt-tuning"), lorary.method("bitfit")):
        assert lorary.with_prompt_text(method, tokenizer()) is method
    found = lorary.with_prompt_text(lorary.method("prompt-tuning", init_text="two"), tokenizer())
    assert lorary.with_prompt_text(found, None) is found


# --- kept, taken off --------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.shaken(prompted(), 0.1)
    lorary.save(model, tmp_path / "a")
    again = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "a")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    assert lorary.Adapter.of(again).method == lorary.Adapter.of(model).method


@pytest.mark.parametrize("name", BASES[:2])
def test_disabled_switched_and_detached_the_base_is_back(name: str) -> None:
    model = tiny.seeded(name)
    plain, before = tiny.logits(model), tiny.everything(model)
    lorary.attach(model, lorary.plan(model, lorary.method("prompt", tokens=L)))
    found, adapter = tiny.logits(model), lorary.Adapter.of(model)
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), plain)
    lorary.switch(model, None)
    assert torch.equal(tiny.logits(model), plain)
    lorary.switch(model, adapter)
    assert torch.equal(tiny.logits(model), found)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), plain)
    assert tiny.everything(model)[1] == before[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 0}, "join: Prompt has tokens = 0; it takes a whole number of at least 1"),
        ({"start": "words"}, "join: Prompt has start = 'words'; it takes vocabulary or uniform or text"),
        ({"start": "uniform", "init_text": "two"}, "start: is 'uniform', and init_text is a text to start at"),
        ({"start": "text"}, "init_text: is empty, and the prompt starts at it"),
        ({"init_text": 3}, "init_text: is 3; it takes a text"),
        ({"r": 4}, "r: prompt-tuning sets NoUpdate(), which has no rank"),
        ({"dropout": 0.5}, "dropout: Prompt adds no update whose input dropout could act on"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError) as refused:
        lorary.method("prompt-tuning", **options)
    assert said in str(refused.value)


def test_without_its_context_it_would_do_nothing() -> None:
    with pytest.raises(MethodError, match="context: is missing: Prompt takes effect through it"):
        lorary.method("prompt-tuning").replace(context=None)


def test_a_text_without_a_tokenizer() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    plan, before = lorary.plan(model, lorary.method("prompt-tuning", init_text="hello")), tiny.everything(model)
    with pytest.raises(MethodError, match="whose token ids are missing") as refused:
        lorary.attach(model, plan)
    assert "lorary.with_prompt_text(method, tokenizer) adds them" in str(refused.value)
    assert tiny.everything(model) == before


def test_a_text_of_another_vocabulary() -> None:
    method = lorary.with_prompt_text(lorary.method("prompt", init_text="hello world"), tokenizer())
    with pytest.raises(PlanError, match=r"model.embed_tokens: token \d+ of the text is not in its vocabulary of 40"):
        lorary.plan(tiny.llama(), method)


def test_a_text_without_tokens() -> None:
    method = lorary.method("prompt", start="text", init_text=" ")
    bare = tokenizer()
    bare.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Strip()
    with pytest.raises(MethodError, match="init_text: is ' ', which has no tokens"):
        lorary.with_prompt_text(method, bare)


@pytest.mark.parametrize("targets", ["q_proj", ["embedding", "lm_head"]])
def test_other_targets(targets: Any) -> None:
    with pytest.raises(PlanError, match="is not the token embedding, before which a prompt could stand"):
        lorary.plan(tiny.llama(), lorary.method("prompt-tuning"), targets)


def test_the_positions_are_no_token_embedding() -> None:
    with pytest.raises(PlanError, match=r"a prompt stands at the token embedding, transformer\.wte, alone"):
        lorary.plan(tiny.model("GPT2LMHeadModel"), lorary.method("prompt-tuning"), "wpe")


def test_two_that_stand_before_the_text() -> None:
    with pytest.raises(MethodError) as refused:
        lorary.method("prefix-tuning", "prompt-tuning")
    assert "context: prefix-tuning and prompt-tuning both choose the context" in str(refused.value)


def test_it_is_never_merged() -> None:
    with pytest.raises(StateError, match="Prompt stands before the text, which no weight and bias can"):
        lorary.merge(prompted())


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma2ForCausalLM"])
def test_a_sliding_window_would_lose_sight_of_it(name: str) -> None:
    with pytest.raises(
        PlanError, match=r"layers of \w+ use a sliding window of 4,096 tokens, which would lose sight of them"
    ):
        lorary.plan(tiny.model(name, "meta"), lorary.method("prompt-tuning"))
    lorary.plan(tiny.model(name, "meta", sliding_window=None), lorary.method("prompt-tuning"))
