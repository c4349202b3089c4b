"""New tokens: where they go, what their rows start at, and every reason against them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

import lorary
from lorary.errors import LoraryError, PlanError, StateError
from tests.methods.test_token_rows import attached, llama
from tests.train.small import tokenizer


def test_padding_rows_are_taken_before_the_model_is_resized() -> None:
    words, model = tokenizer(), llama(size=320)
    before = model.model.embed_tokens.weight.detach().clone()
    first = len(words)
    ids = lorary.add_tokens(model, words, ["<a>", "<b>"])
    assert ids == (first, first + 1)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert words.tokenize("x<a> y")[1] == "<a>"
    assert words("<b>", add_special_tokens=False)["input_ids"] == [first + 1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_has_the_mean_in_its_new_rows_and_says_the_same_otherwise(tied: bool) -> None:
    words, model, plain = tokenizer(), llama(tied=tied, size=300), llama(tied=tied, size=300)
    ids = lorary.add_tokens(model, words, ["<a>", "<b>", "<c>"])
    assert max(ids) + 1 == model.config.vocab_size == model.model.embed_tokens.weight.shape[0]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for new, old in ((m, p) for m, p in zip(tables(model), tables(plain), strict=True)):
        assert torch.equal(new[:300], old)
        mean = old.double().mean(0).float()
        assert all(torch.equal(row, mean) for row in new[300:])
    x = torch.tensor([[5, 6, 7]])
    assert (model(x).logits[..., :300] - plain(x).logits).abs().max() < 1e-6
    assert all(p.requires_grad for p in model.parameters())


def tables(model: Any) -> list[torch.Tensor]:
    return [model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()]


def test_two_resized_models_are_the_same_base_and_another_is_another() -> None:
    one, two = (lorary.Fingerprint.of(lorary.resize_vocabulary(llama(), 44)) for _ in range(2))
    assert one == two
    assert one != lorary.Fingerprint.of(lorary.resize_vocabulary(llama(), 45))


def test_a_quantised_base_has_the_fingerprint_of_the_plain_one_when_both_are_resized() -> None:
    plain = lorary.resize_vocabulary(llama(hidden_size=64), 44)
    packed = lorary.resize_vocabulary(lorary.quantize(llama(hidden_size=64)), 44)
    assert lorary.Fingerprint.of(packed) == lorary.Fingerprint.of(plain)


def test_works_on_the_meta_device_and_with_an_encoder() -> None:
    with torch.device("meta"):
        assert lorary.resize_vocabulary(llama(), 44).lm_head.weight.shape == (44, 16)
    config = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    config.decoder_ffn_dim, config.encoder_attention_heads, config.decoder_attention_heads = 16, 2, 2
    bart = lorary.resize_vocabulary(BartForConditionalGeneration(config), 42)
    plan = lorary.plan(bart, lorary.method("rows", tokens=[40, 41]))
    assert len({p.share for p in plan.sites}) == 1
    assert plan.trainable == 2 * 16


def test_padding_rows_start_at_the_mean_of_the_rows_before_them() -> None:
    words, model = tokenizer(), llama(tied=False, size=320)
    ids = lorary.add_tokens(model, words, ["<a>"])
    from lorary.methods.token_rows import with_new_tokens

    method = with_new_tokens(lorary.method("rows", tokens=[5]), ids, ["<a>"])
    adapted = lorary.attach(model, lorary.plan(model, method))
    mean = tables(llama(tied=False, size=320))[0][: ids[0]].double().mean(0).float()
    R = adapted.model.embed_tokens.params["R"]
    assert torch.equal(R[1], mean)
    assert torch.equal(R[0], tables(llama(tied=False, size=320))[0][5])


def test_untied_ends_are_two_tensors_that_stay_two() -> None:
    model = lorary.untie_embeddings(llama())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


class Words:
    """Something else than a tokenizer."""


REFUSED: list[tuple[Any, Any, str]] = [
    ([], None, "tokens: names no token"),
    ("<a>", None, "tokens: is '<a>', not a list of texts"),
    (["<a>", "<a>"], None, "tokens: '<a>' is there twice"),
    ([""], None, "tokens: '' is not a text"),
    (["  "], None, "tokens: '  ' is not a text"),
    ([7], None, "tokens: 7 is not a text"),
    (["<a>", "<\ud83d>"], None, r"tokens: '<\ud83d>' has half of a letter, which UTF-8 cannot write"),
    (
        ["</s>"],
        None,
        "tokens: '</s>' is token 1 of the tokenizer already\n      hint: train its row by its id: tokens: [1]",
    ),
    (["<a>"], Words, "tokenizer: a Words takes no new tokens"),
]


@pytest.mark.parametrize(("tokens", "words", "sentence"), REFUSED, ids=str)
def test_tokens_that_cannot_be_added_change_nothing(tokens: Any, words: Any, sentence: str) -> None:
    words = (words or tokenizer)()
    model, before = llama(size=300), len(words) if hasattr(words, "__len__") else 0
    with pytest.raises(PlanError) as caught:
        lorary.add_tokens(model, words, tokens)
    assert sentence in str(caught.value)
    assert model.config.vocab_size == 300
    assert not before or len(words) == before


def with_holes() -> PreTrainedTokenizerFast:
    """A tokenizer of four tokens whose highest id is 4: the next new token would be token 4."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 3, "z": 4}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")


def test_a_new_token_never_gets_the_id_of_another_one() -> None:
    model, words = llama(), with_holes()
    with pytest.raises(PlanError, match="'<x>' would be token 4, which is 'z' already: the ids of this tokenizer have"):
        lorary.add_tokens(model, words, ["<x>", "<y>"])
    assert len(words) == 4
    assert model.config.vocab_size == 40


def test_a_model_that_cannot_grow_leaves_the_tokenizer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = llama(size=299), tokenizer()

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model, "resize_token_embeddings", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        lorary.add_tokens(model, words, ["<a>", "<b>"])
    assert "<a>" not in words.get_vocab()


def test_models_that_cannot_be_resized_are_refused() -> None:
    with pytest.raises(StateError, match="has an adapter attached"):
        lorary.resize_vocabulary(attached(), 50)
    with pytest.raises(PlanError, match="has an adapter attached"):
        lorary.add_tokens(attached(), tokenizer(), ["<a>"])
    with pytest.raises(StateError, match="is 39, and the model has 40 rows: some would be lost"):
        lorary.resize_vocabulary(llama(), 39)
    for size in (41.0, True, "41", None):
        with pytest.raises(StateError, match="some would be lost"):
            lorary.resize_vocabulary(llama(), size)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="a Sequential names no table of token embeddings"):
        lorary.resize_vocabulary(nn.Sequential(nn.Embedding(4, 4)), 8)
    with pytest.raises(LoraryError, match=r"not a torch\.nn\.Module"):
        lorary.resize_vocabulary(None, 8)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="ties no weights"):
        lorary.untie_embeddings(llama(tied=False))
    with pytest.raises(StateError, match="has an adapter attached"):
        lorary.untie_embeddings(attached())


def test_an_adapter_of_another_vocabulary_says_what_to_do(tmp_path: Any) -> None:
    model = attached(tokens=(41,), model=lorary.resize_vocabulary(llama(), 44))
    lorary.save(model, tmp_path)
    with pytest.raises(LoraryError) as caught:
        lorary.load(llama(), tmp_path)
    assert "the adapter was trained on a vocabulary of 44 tokens, and this model has 40" in str(caught.value)
    assert "resize the base first: lorary.resize_vocabulary(model, 44)" in str(caught.value)
    with pytest.raises(LoraryError, match="load the base that it was trained on"):
        lorary.load(lorary.resize_vocabulary(llama(), 50), tmp_path)


def test_quantised_token_embeddings_are_refused_with_their_reason() -> None:
    """A table in NF4 is no layer of PyTorch."""
    model, words = llama(tied=False, hidden_size=64), tokenizer()
    lorary.quantize(model, lorary.NF4(embeddings=True))
    with pytest.raises(PlanError, match="model: its token embeddings are quantised"):
        lorary.add_tokens(model, words, ["<a>"])
    with pytest.raises(StateError, match="model: its token embeddings are quantised"):
        lorary.resize_vocabulary(model, 50)
