"""The loss over labelled tokens is the loss; what the head computes, and what it does not keep."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel
from trl.trainer.utils import add_fused_lm_head

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.model.labelled_head import STATISTICS, LabelledHead
from tests.other_libraries import skip_if_right
from tests.train.runs import adapted, llama

TOKENS = 20


def _gpt2() -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, **ends)).eval()


def _gemma2(size: float = 1.0) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=90)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": lambda: llama().eval(),
    "Llama, tied": lambda: llama(tie_word_embeddings=True).eval(),
    "GPT-2": _gpt2,
    "Gemma 2": _gemma2,
}


def _batch(model: Any) -> tuple[Tensor, Tensor]:
    """Three rows; one without any label, one half labelled, one with a single label at the very end."""
    ids = torch.randint(2, model.config.vocab_size, (3, TOKENS))
    labels = ids.clone()
    labels[0, : TOKENS // 2] = -100
    labels[1] = -100
    labels[2, :-1] = -100
    return ids, labels


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [4, 512])
def test_loss_and_gradients_are_those_of_the_model_itself(name: str, chunk: int) -> None:
    model = MODELS[name]()
    ids, labels = _batch(model)
    own = model(input_ids=ids, labels=labels).loss
    expected = _gradients(model, own)
    head = LabelledHead(model, chunk=chunk).install()
    scores = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(scores.loss, own, rtol=1e-6, atol=1e-6)
    for found, wanted in zip(_gradients(model, scores.loss), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert head.plain is (name != "Gemma 2")


def test_a_model_that_caps_its_logits_is_noticed_however_small_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = _gemma2()
    ids, labels = _batch(model)
    LabelledHead(model).install()
    with caplog.at_level(logging.WARNING, logger="lorary.train"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # once, not at every step
    assert said[0].startswith("Gemma2ForCausalLM: its logits are not its LM head's output alone (they differ by ")
    assert said[0].endswith("); the loss uses the model's full logits")


def test_without_that_look_the_loss_would_be_wrong() -> None:
    model = _gemma2(size=200.0)
    ids, labels = _batch(model)
    own = model(input_ids=ids, labels=labels).loss
    head = LabelledHead(model).install()
    head.plain = True
    wrong = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    assert abs(wrong - own) > 0.1
    head.plain = None
    torch.testing.assert_close(model(input_ids=ids, labels=labels, fused_lm_head=True).loss, own)


def test_an_adapter_on_the_head_counts_and_trains() -> None:
    model = adapted(targets=["q_proj", "lm_head"], model=llama(tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    ids, labels = _batch(model)
    own = model(input_ids=ids, labels=labels).loss
    theirs = copy.deepcopy(model)
    LabelledHead(model, chunk=3).install()
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.lm_head.params.values())
    add_fused_lm_head(theirs)  # TRL's reads `lm_head.weight`: why it is not used
    skip_if_right("trl", torch.allclose(theirs(input_ids=ids, labels=labels, fused_lm_head=True).loss, own))


def test_only_labelled_tokens_reach_the_head() -> None:
    model = adapted(targets=["lm_head"], model=llama(tie_word_embeddings=False))
    ids, labels = _batch(model)
    head = LabelledHead(model, chunk=4).install()
    model(input_ids=ids, labels=labels, fused_lm_head=True)  # the first call looks at the model
    seen: list[int] = []
    model.lm_head.base.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert head.plain
    assert sum(seen) == int((labels[:, 1:] != -100).sum()) == 11
    assert max(seen) <= 4


def test_logits_are_not_kept_for_the_backward_pass() -> None:
    model = llama(tie_word_embeddings=False).requires_grad_(False)
    model.enable_input_require_grads()
    ids = torch.randint(2, 300, (2, 65))
    logits = 2 * 64 * 300 * 4
    LabelledHead(model, chunk=16, statistics=()).install()
    known = list(model.parameters())
    model(input_ids=ids, labels=ids, fused_lm_head=True)

    def bytes_of(labels: Tensor, **words: Any) -> int:
        return kept_for_backward(lambda: model(input_ids=ids, labels=labels, **words).loss, beyond=known)

    backbone = kept_for_backward(lambda: model.model(input_ids=ids).last_hidden_state, beyond=known)
    assert bytes_of(ids) - backbone >= logits
    assert bytes_of(ids, fused_lm_head=True) - backbone < 0.5 * logits  # the last of eight chunks, and the states


def test_statistics_are_those_of_the_distribution() -> None:
    model = llama().eval()
    ids, labels = _batch(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
        LabelledHead(model, STATISTICS, chunk=5).install()
        scores = model(input_ids=ids, labels=labels, fused_lm_head=True)
    mask, log_p = labels[:, 1:] != -100, logits.log_softmax(-1)
    expected = {
        "log_probs": log_p.gather(-1, ids[:, 1:, None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": logits.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }
    for name, wanted in expected.items():
        torch.testing.assert_close(scores[name], wanted.masked_fill(~mask, 0), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores["is_top1"], (logits.argmax(-1) == ids[:, 1:]) & mask)
    assert torch.equal(scores["label_mask"], mask)


def test_a_batch_without_a_label_has_a_loss_of_zero_and_a_gradient_of_zero() -> None:
    model = adapted(targets=["q_proj", "lm_head"])
    ids = torch.randint(2, 300, (2, 9))
    LabelledHead(model).install()
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss
    assert loss.item() == 0
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)  # DDP waits for every one of them


def test_labels_may_come_shifted_and_the_count_from_outside() -> None:
    model = llama().eval()
    ids, labels = _batch(model)
    LabelledHead(model).install()
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    torch.testing.assert_close(model(input_ids=ids, shift_labels=shifted, fused_lm_head=True).loss, loss)
    halved = model(input_ids=ids, labels=labels, num_items_in_batch=22, fused_lm_head=True).loss
    torch.testing.assert_close(halved, loss / 2)


def test_the_first_look_changes_nothing() -> None:
    model = adapted(attention_dropout=0.5, dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a module in another mode stays in it
    ids = torch.randint(2, 300, (1, 6))
    before, modes = torch.random.get_rng_state(), [m.training for m in model.modules()]
    assert LabelledHead(model)._is_plain(ids)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes


def test_the_model_gets_its_own_forward_back() -> None:
    model = llama()
    head = LabelledHead(model).install()
    assert "forward" in model.__dict__
    head.remove()
    assert "forward" not in model.__dict__
    assert model.lm_head.__dict__.get("forward") is None
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    assert copy.deepcopy(model)(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 300)
