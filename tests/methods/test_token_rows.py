"""Rows of tokens: which numbers train, what a tie means for them, and their forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorary
from lorary.errors import FileError, MethodError, PlanError
from lorary.layers.adapted import adapted_layers

TOKENS = (7, 3, 39)


def llama(*, tied: bool = True, size: int = 40, **options: Any) -> LlamaForCausalLM:
    """The same numbers at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=size, tie_word_embeddings=tied, pad_token_id=0, **(sizes | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def ids() -> Tensor:
    """Rows with the tokens of interest, with others, and with padding."""
    return torch.tensor([[3, 7, 3, 39, 12, 5, 0, 38], [1, 2, 7, 8, 39, 0, 0, 3]])


def moved(model: nn.Module) -> nn.Module:
    """As after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def attached(*, tied: bool = True, tokens: tuple[int, ...] = TOKENS, model: Any = None) -> Any:
    model = llama(tied=tied) if model is None else model
    return lorary.attach(model, lorary.plan(model, lorary.method("rows", tokens=tokens)))


def close(a: Tensor, b: Tensor, most: float = 2e-6) -> None:
    assert (a - b).abs().max() <= most * b.abs().max()


@pytest.mark.parametrize(("tied", "count"), [(True, 3 * 16), (False, 2 * 3 * 16)])
def test_only_the_rows_of_the_tokens_train(tied: bool, count: int) -> None:
    model = attached(tied=tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(model(ids()).logits, llama(tied=tied)(ids()).logits)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    lorary.merge(model)
    for table, plain in ((m.get_input_embeddings().weight, m.lm_head.weight) for m in (model, llama(tied=tied))):
        assert table.shape == plain.shape
    rows = (model.model.embed_tokens.weight != llama(tied=tied).model.embed_tokens.weight).any(1).nonzero().flatten()
    assert sorted(rows.tolist()) == sorted(TOKENS)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_rows_in_full_training(tied: bool) -> None:
    full = llama(tied=tied).train()
    full(input_ids=ids(), labels=ids()).loss.backward()
    model = attached(tied=tied).train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    tables = {"model.embed_tokens": full.model.embed_tokens.weight, "lm_head": full.lm_head.weight}
    for name, layer in adapted_layers(model).items():
        close(layer.params["R"].grad, tables[name].grad[list(TOKENS)], 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_keeps_the_tie_and_unmerging_gives_it_back(tied: bool) -> None:
    model = moved(attached(tied=tied))
    y = model(ids()).logits
    lorary.merge(model, keep=True)
    close(model(ids()).logits, y)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    lorary.unmerge(model)
    assert torch.equal(model(ids()).logits, y)
    lorary.detach(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids()).logits, llama(tied=tied)(ids()).logits)


def test_a_merged_model_is_saved_and_loaded_as_a_tied_one(tmp_path: Path) -> None:
    model = moved(attached())
    y = model(ids()).logits
    lorary.merge(model).save_pretrained(tmp_path)
    close(LlamaForCausalLM.from_pretrained(tmp_path).eval()(ids()).logits, y)


def test_rows_of_one_use_alone_untie_the_model_when_merged_and_the_plan_says_so() -> None:
    model = llama()
    plan = lorary.plan(model, lorary.method("rows", tokens=TOKENS), "lm_head")
    assert "lm_head shares its weight with model.embed_tokens.weight" in str(plan)
    y = moved(lorary.attach(model, plan))(ids()).logits
    lorary.merge(model)
    close(model(ids()).logits, y)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, llama().model.embed_tokens.weight)


def test_the_plan_says_what_is_tied() -> None:
    text = str(lorary.plan(llama(), lorary.method("rows", tokens=TOKENS)))
    assert "model.embed_tokens and lm_head are tied: one set of tensors trains for all uses" in text
    assert "a weight of its own" not in text


@pytest.mark.parametrize("tied", [True, False])
def test_the_low_rank_form_is_a_selection_times_the_change(tied: bool) -> None:
    model = moved(attached(tied=tied))
    base, adapter = llama(tied=tied), lorary.Adapter.of(model)
    forms = adapter.low_rank(base)
    for name, table in (("model.embed_tokens", base.model.embed_tokens.weight), ("lm_head", base.lm_head.weight)):
        form = forms[name]
        change = form.B @ form.A if name == "lm_head" else (form.B @ form.A).T  # [vocabulary, width]
        assert form.is_plain
        assert form.B.shape[1] == len(TOKENS)
        expected = torch.zeros_like(table)
        expected[list(TOKENS)] = adapter.tensors[name]["R"] - table[list(TOKENS)]
        assert torch.equal(change, expected)
    with pytest.raises(MethodError, match="TokenRows has no such form without the base's weight"):
        adapter.low_rank()


def test_the_padding_row_gets_no_gradient_as_in_an_embedding() -> None:
    model = attached(tied=False, tokens=(0, 3))
    model(ids()).logits.sum().backward()
    R = adapted_layers(model)["model.embed_tokens"].params["R"]
    assert not R.grad[0].any()
    assert R.grad[1].any()


def test_16_bit_bases_keep_steps_smaller_than_their_precision() -> None:
    model = attached(model=llama(tied=False).to(torch.bfloat16))
    head = adapted_layers(model)["lm_head"]
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    before = model.lm_head(x)
    with torch.no_grad():
        head.params["R"].mul_(1 + 2**-10)
    assert head.params["R"].dtype is torch.float32
    small = (model.lm_head(x) - before)[:, list(TOKENS)]
    assert torch.isfinite(small).all()
    W = head.matrix.float()[list(TOKENS)]
    assert not torch.equal(head.params["R"], head.params["R"].to(torch.bfloat16).float())
    close(head.params["R"], W, 2**-9)


def test_heads_with_a_bias_and_scaled_or_padded_tables() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model: Any = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    y = moved(attached(model=model))(ids()).logits
    lorary.merge(model)
    close(model(ids()).logits, y)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight


def test_positions_are_no_tokens() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    plan = lorary.plan(model, lorary.method("rows", tokens=[3]))
    assert [p.site.name for p in plan.sites] == ["transformer.wte", "lm_head"]


def test_beside_lora_on_the_linear_layers(tmp_path: Path) -> None:
    model = llama()
    parts = {"all-linear": lorary.method("lora", r=2), "vocabulary": lorary.method("rows", tokens=TOKENS)}
    plan = lorary.plan(model, parts)
    assert len(plan.sites) == 14 + 2
    y = moved(lorary.attach(model, plan))(ids()).logits
    lorary.save(model, tmp_path)
    assert torch.equal(lorary.load(llama(), tmp_path)(ids()).logits, y)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 40_000


@pytest.mark.filterwarnings("ignore")
def test_a_table_whose_new_rows_were_drawn_otherwise_is_the_same_base(tmp_path: Path) -> None:
    def resized(seed: int) -> Any:
        torch.manual_seed(seed)
        model = llama(size=40)
        model.resize_token_embeddings(42)
        return model

    model = moved(attached(tokens=(40, 41), model=resized(1)))
    x = torch.tensor([[40, 3, 41, 2]])
    y = model(x).logits
    lorary.save(model, tmp_path)
    close(lorary.load(resized(2), tmp_path)(x).logits, y)


METHODS: list[tuple[Any, str]] = [
    ([-1], "token -1 is negative"),
    ([3, 3], "token 3 is named twice"),
    (["<a>"], "'<a>' is a text, and a method takes ids"),
    ([1.5], "is [1.5]; it takes ids of tokens"),
    ([True], "is [True]; it takes ids of tokens"),
    (None, "is None; it takes ids of tokens"),
    ("<a>", "'<' is a text, and a method takes ids"),
]


@pytest.mark.parametrize(("tokens", "sentence"), METHODS, ids=str)
def test_tokens_that_are_none_are_refused(tokens: Any, sentence: str) -> None:
    with pytest.raises(MethodError) as caught:
        lorary.method("rows", tokens=tokens)
    assert sentence in str(caught.value)


PLANS: list[tuple[Any, Any, str]] = [
    ((), None, "no token is named: tokens=[...]"),
    ((40,), None, "token 40 is outside its vocabulary of 40: resize the model to at least 41"),
    ((3,), "q_proj", "token 3 is outside"),
    ((3,), "model.norm", "not a layer with a weight matrix"),
]


@pytest.mark.parametrize(("tokens", "targets", "sentence"), PLANS, ids=str)
def test_plans_that_cannot_be_are_refused(tokens: Any, targets: Any, sentence: str) -> None:
    if targets == "q_proj":
        tokens, sentence = (16,), "token 16 is outside its vocabulary of 16"
    with pytest.raises(PlanError) as caught:
        lorary.plan(llama(), lorary.method("rows", tokens=tokens), targets)
    assert sentence in str(caught.value)


def test_models_without_a_vocabulary_and_layers_that_train_otherwise_are_refused() -> None:
    with pytest.raises(PlanError, match="`vocabulary` matches no layer of this model"):
        lorary.plan(nn.Sequential(nn.Linear(4, 4)), lorary.method("rows", tokens=[1]))
    conv = nn.Sequential(nn.Conv1d(4, 4, 3))
    with pytest.raises(PlanError, match="is neither an embedding nor a whole linear layer"):
        lorary.plan(conv, lorary.method("rows", tokens=[1]), "0")
    both = {"embedding": lorary.method("lora", r=2), "vocabulary": lorary.method("rows", tokens=[1])}
    with pytest.raises(PlanError, match="both adapt model\\.embed_tokens"):
        lorary.plan(llama(), both)
    with pytest.raises(PlanError, match="train"):
        lorary.plan(llama(), lorary.method("rows", tokens=[1]), full=["embed_tokens"])


def test_ids_of_32_bits() -> None:
    model = moved(attached())
    assert torch.equal(model.model.embed_tokens(ids().int()), model.model.embed_tokens(ids()))


DAMAGED: list[tuple[str, Any, str]] = [
    ("tokens", [7, 7, 39], "token 7 is named twice"),
    ("tokens", [7, 3, 40], "token 40 is outside its vocabulary of 40"),
    ("tokens", [7, 3, -1], "it takes token ids"),
    ("tokens", [7, 3, 3.5], "it takes token ids"),
    ("tokens", [], "no token is named"),
    ("tokens", "7", "it takes token ids"),
    ("added", ["a", "b", "c", "d"], "has texts for 4 added tokens, and 3 tokens"),
    ("added", [7], "it takes texts"),
    ("rank", 3, "TokenRows has no field `rank`"),
]


@pytest.mark.parametrize(("key", "value", "sentence"), DAMAGED, ids=str)
def test_damaged_records_are_refused(key: str, value: Any, sentence: str, tmp_path: Path) -> None:
    lorary.save(attached(), tmp_path)
    record = json.loads((tmp_path / "lorary.json").read_text())
    record["method"]["join"][key] = value
    (tmp_path / "lorary.json").write_text(json.dumps(record))
    model = llama()
    with pytest.raises(FileError) as caught:
        lorary.load(model, tmp_path)
    assert sentence in str(caught.value)
    assert not adapted_layers(model)
