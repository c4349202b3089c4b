"""Shifted sparse attention in models of Transformers: in training alone, on every architecture that looks it up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import PlanError, StateError
from lorary.layers.rope import text_config
from lorary.layers.shifted_attention import check_support, register_attention, sequence_numbers
from lorary.model.state import eval_mode
from tests import tiny

# Class -> what its tiny configuration says besides; families with grouped keys, fused weights, partial rotation,
# norms of heads, parallel blocks, experts, and windows in some layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "MixtralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "GemmaForCausalLM": {},
    "Gemma3ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {"sliding_window": None},
    "GPTNeoXForCausalLM": {},
    "OlmoForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Starcoder2ForCausalLM": {"sliding_window": None},
    "CohereForCausalLM": {},
    "GraniteForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "GlmForCausalLM": {},
}
LENGTH = 13


def made(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny.model(name, **FAMILIES.get(name, {}) | changes)


def longer(model: Any, **options: Any) -> Any:
    """The model with LongLoRA attached, in training mode and as after some of it."""
    options = {"length": 64, "r": 2} | options
    lorary.attach(model, lorary.plan(model, lorary.method("longlora", **options)))
    return tiny.shaken(model, 0.1).train()


def states(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, use_cache=False).logits
    return out


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_training_groups_in_evaluation_everything(name: str) -> None:
    model = longer(made(name))
    ids = tokens()
    trained = states(model, input_ids=ids)
    full = states(model.eval(), input_ids=ids)
    gap = (trained - full).abs().amax((0, 2))
    assert gap.max() > 1e-4, "attention in groups is another function"
    assert gap[0] < 1e-5, "the first token sees itself alone either way"
    same = states(model.train(), input_ids=ids)
    assert torch.equal(same, trained)
    with eval_mode(model):
        assert torch.equal(states(model, input_ids=ids), full)
    assert torch.equal(states(model, input_ids=ids), trained), "the mode came back without `train` being called"


@pytest.mark.parametrize("name", FAMILIES)
def test_in_training_no_output_sees_a_later_token(name: str) -> None:
    model, ids = longer(made(name)), tokens()
    before = states(model, input_ids=ids)
    for token in (1, 6, LENGTH - 1):
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 1) % 37 + 3
        moved = (states(model, input_ids=changed) - before).abs().amax(-1) > 1e-6
        assert not moved[:, :token].any()
        assert moved[:, token].all()


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_are_as_each_by_itself(name: str) -> None:
    """With groups of the same size: a quarter of 13 is one of 16, rounded up."""
    model, short, long = longer(made(name)), tokens(1, 13), tokens(1, 16)
    alone = states(model, input_ids=short), states(model, input_ids=long)
    pad = torch.zeros(1, 3, dtype=torch.long)
    for left in (False, True):
        row, mask, at = (
            torch.cat([pad, part] if left else [part, pad], 1)
            for part in (short, torch.ones_like(short), torch.arange(13)[None])
        )
        both = states(
            model,
            input_ids=torch.cat([row, long]),
            attention_mask=torch.cat([mask, torch.ones_like(long)]),
            position_ids=torch.cat([at, torch.arange(16)[None]]),
        )
        assert torch.allclose(both[0][mask[0].bool()], alone[0][0], atol=1e-5)
        assert torch.allclose(both[1], alone[1][0], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_are_as_each_by_itself(name: str) -> None:
    """Two sequences of one length in a row, and the row again in two: the longest one says how large groups are."""
    model, ids = longer(made(name)), tokens(2, 8)
    at = torch.arange(8).repeat(2)[None]
    packed = states(model, input_ids=ids.reshape(1, 16), position_ids=at)
    alone = states(model, input_ids=ids)
    assert torch.allclose(packed.reshape(2, 8, -1), alone, atol=1e-5)


def test_a_short_sequence_in_a_packed_row_has_groups_of_its_own() -> None:
    model = longer(made("LlamaForCausalLM"))
    ids, at = tokens(1, 16), torch.cat([torch.arange(3), torch.arange(13)])[None]
    before = states(model, input_ids=ids, position_ids=at)
    changed = ids.clone()
    changed[:, 0] = 39 - changed[:, 0]
    moved = ((states(model, input_ids=changed, position_ids=at) - before).abs().amax(-1) > 1e-6)[0]
    assert moved.tolist() == [True] * 3 + [False] * 13


def test_evaluation_is_the_model_without_it_bit_for_bit() -> None:
    """Not only the logits: a generation with a cache, under every kernel that the base may have been loaded with."""
    for kernel in ("sdpa", "eager"):
        plain = made("LlamaForCausalLM", attn_implementation=kernel)
        model = longer(copy.deepcopy(plain)).eval()
        merged = lorary.merge(copy.deepcopy(model))
        assert model.config._attn_implementation == plain.config._attn_implementation == kernel
        ids = tokens()
        other = longer(copy.deepcopy(plain), shifted=False).eval()
        assert torch.equal(states(model, input_ids=ids), states(other, input_ids=ids))
        words = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, **words), other.generate(ids, **words))
        assert torch.allclose(states(model, input_ids=ids), states(merged, input_ids=ids), atol=1e-4)


def test_gradients_flow_under_checkpointing_as_without() -> None:
    grads = []
    for again in (False, True):
        model = longer(made("LlamaForCausalLM"))
        if again:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids = tokens()
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_a_compiled_model_computes_the_same() -> None:
    model, ids = longer(made("LlamaForCausalLM")), tokens()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    expected = states(model, input_ids=ids), states(model, input_ids=ids, attention_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(states(compiled, input_ids=ids), expected[0], atol=1e-5)
    assert torch.allclose(states(compiled, input_ids=ids, attention_mask=mask), expected[1], atol=1e-5)
    model.eval()
    assert torch.allclose(states(compiled, input_ids=ids), states(model, input_ids=ids), atol=1e-5)


def test_a_copy_of_the_model_switches_by_itself() -> None:
    model = longer(made("LlamaForCausalLM"))
    twin = copy.deepcopy(model).eval()
    assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == register_attention(4)
    lorary.detach(twin)
    assert model.config._attn_implementation == register_attention(4)
    assert not any("lorary" in name for name, _ in twin.named_modules())


def test_masks_that_are_not_causal_are_refused() -> None:
    model, ids = longer(made("LlamaForCausalLM")), tokens()
    with pytest.raises(StateError) as refusal:
        model(input_ids=ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    assert str(refusal.value) == (
        "cannot compute shifted sparse attention:\n"
        "  - attention_mask: has 4 dimensions; grouped attention takes padding, [batch, tokens]\n"
        "      hint: pass the padding mask"
    )
    with pytest.raises(StateError, match="lets some tokens attend to later ones"):
        sequence_numbers(lambda b, h, q, k: (q >= 0) & (k >= 0) & (b >= 0), None, 2, 5, torch.device("cpu"))


REFUSED = {
    "all layers of MistralForCausalLM use a sliding window of 4 tokens, which S² cannot divide": (
        "MistralForCausalLM",
        {"sliding_window": 4},
    ),
    "Gemma2ForCausalLM caps attention scores, which grouped attention does not support": ("Gemma2ForCausalLM", {}),
    "GptOssForCausalLM has attention sinks, which grouped attention does not support": (
        "GptOssForCausalLM",
        {},
    ),
    "StableLmForCausalLM does not use Transformers' attention interface, so its attention cannot be replaced": (
        "StableLmForCausalLM",
        {},
    ),
    "ModernBertForMaskedLM has bidirectional attention": ("ModernBertForMaskedLM", {}),
}


@pytest.mark.parametrize(("sentence", "of"), REFUSED.items())
def test_what_a_model_has_that_groups_have_not(sentence: str, of: tuple[str, dict[str, Any]]) -> None:
    model = made(of[0], **of[1])
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, lorary.method("longlora", length=64))
    assert sentence in str(refusal.value)
    assert "hint: set shifted=False to train with full attention" in str(refusal.value)


def test_layers_with_a_window_keep_it_and_the_plan_says_so() -> None:
    model = made("Gemma3ForCausalLM")
    plan = lorary.plan(model, lorary.method("longlora", length=64))
    assert "1 of 2 layers keep their sliding window; the others attend in groups" in plan.notes
    wide = made("Gemma3ForCausalLM", sliding_window=64)
    assert not check_support(wide, text_config(wide), 64).notes


class Own(nn.Module):
    """A model that is none of Transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


def test_a_model_of_ones_own_has_no_positions_to_divide() -> None:
    with pytest.raises(PlanError, match="context: Own has no rotary position embeddings to scale"):
        lorary.plan(Own(), lorary.method("longlora", length=64), "q_proj")
