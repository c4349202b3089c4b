"""Positions that are divided: the model is the one that Transformers makes of the changed configuration, and back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.layers import rope
from lorary.layers.rope import ScaledRope, max_context, original_context, rope_parameters, scaling_factor, text_config
from tests import tiny

KNOWN = 8
# What is rotated of a head has to be wider than two numbers: dynamic scaling divides by two less.
WIDE: dict[str, dict[str, Any]] = {kind: {"head_dim": 16} for kind in ("Qwen3", "Gemma", "Glm")} | {
    "Gemma3": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"original_max_position_embeddings": KNOWN},
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "Phi", "Phi3", "GPTNeoX", "Olmo2", "Cohere", "Glm"]


def made(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    changes = {"max_position_embeddings": KNOWN, "hidden_size": 64} | WIDE.get(kind, {}) | changes
    return tiny.model(f"{kind}ForCausalLM", **changes)


def long_logits(model: Any) -> Tensor:
    ids = torch.randint(3, 40, (1, 3 * KNOWN), generator=torch.Generator().manual_seed(1))
    return tiny.logits(model, input_ids=ids)


def rebuilt(model: Any) -> Any:
    """A model that is made of the configuration as it is now, with the same weights."""
    other = type(model)(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("form", rope.FORMS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_model_is_what_transformers_makes_of_the_configuration(kind: str, form: str) -> None:
    model = made(kind)
    plain, modules, before = long_logits(model), dict(model.named_modules()), model.config.to_dict()
    stretched = ScaledRope(model, form, 4.0)
    changed = long_logits(model)
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, long_logits(rebuilt(model)))
    assert max_context(text_config(model)) == 4 * KNOWN
    stretched.swap()
    assert torch.equal(long_logits(model), plain)
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert model.config.to_dict() == before
    stretched.swap()
    assert torch.equal(long_logits(model), changed)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_dynamic_angles_are_of_the_text_at_hand_whatever_was_read_before(kind: str) -> None:
    model = made(kind)
    ScaledRope(model, "dynamic", 4.0)
    ids = [torch.arange(3, 3 + n)[None] for n in (2 * KNOWN, KNOWN, 4 * KNOWN)]
    first = [tiny.logits(model, input_ids=row) for row in ids]
    for row, expected in reversed(list(zip(ids, first, strict=True))):
        assert torch.equal(tiny.logits(model, input_ids=row), expected)


def test_linear_positions_are_divided() -> None:
    """Position interpolation by its own definition: token 4 i of the stretched model is turned like token i."""
    model = made("Llama")
    turn = model.model.rotary_emb
    x, at = torch.zeros(1, 1, 16), torch.arange(KNOWN)[None]
    before = turn(x, at)
    ScaledRope(model, "linear", 4.0)
    for was, now in zip(before, model.model.rotary_emb(x, 4 * at), strict=True):
        torch.testing.assert_close(now, was)


def test_a_factor_on_top_of_another_is_of_what_the_model_was_trained_on() -> None:
    config = made("Llama").config
    assert (original_context(config), max_context(config)) == (8, 8)
    assert [scaling_factor(config, n) for n in (1, 8, 9, 16, 17, 100)] == [1, 1, 2, 2, 3, 13]
    twice = made("Llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    assert (original_context(twice.config), max_context(twice.config)) == (8, 16)
    assert [scaling_factor(twice.config, n) for n in (16, 17, 40)] == [1, 3, 5]
    assert rope.scaling_problems(twice, "linear", 40) == []
    assert rope.scaling_problems(twice, "yarn", 16) == [], "it reads as many already"
    assert rope.scaling_problems(twice, "yarn", 40) == [
        "its 16 tokens of context already use RoPE scaling (linear), which yarn would replace"
    ]
    yarn = made("Llama")
    ScaledRope(yarn, "yarn", 4.0)
    assert (original_context(yarn.config), max_context(yarn.config), yarn.config.max_position_embeddings) == (8, 32, 32)
    assert scaling_factor(yarn.config, 33) == 5


def test_other_forms_of_long_positions_are_left_alone() -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = made("Llama", rope_parameters=scaling | {"original_max_position_embeddings": 4})
    assert max_context(model.config) == KNOWN
    assert rope.scaling_problems(model, "linear", KNOWN) == []
    (what,) = rope.scaling_problems(model, "linear", KNOWN + 1)
    assert what == "its 8 tokens of context already use RoPE scaling (llama3), which linear would replace"


def test_models_without_rotary_positions() -> None:
    for name in ("GPT2LMHeadModel", "BloomForCausalLM", "BertForSequenceClassification"):
        model = tiny.model(name)
        assert rope_parameters(text_config(model)) is None
        (what,) = rope.scaling_problems(model, "linear", 5000)
        assert what == f"{name} has no rotary position embeddings to scale"


def test_the_content_of_a_config_json() -> None:
    """Older ones have `rope_scaling`, with `type`, or nothing at all."""
    llama = SimpleNamespace(max_position_embeddings=8)
    assert (rope.rope_type(llama), max_context(llama)) == ("default", 8)
    llama.rope_scaling = {"type": "linear", "factor": 2}
    assert (rope.rope_type(llama), max_context(llama)) == ("linear", 16)
    llama.rope_scaling = None
    inner = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 2}
    llama.rope_parameters = {"full_attention": inner}
    assert (rope.rope_type(llama), max_context(llama)) == ("yarn", 8)


def test_layers_that_see_a_window_keep_their_angles() -> None:
    """Gemma 3 turns by other angles there, and nothing is further away than its window."""
    model = made("Gemma3")
    turn = model.model.rotary_emb
    before = {name: b.clone() for name, b in turn.named_buffers()}
    ScaledRope(model, "linear", 4.0)
    after = dict(model.model.rotary_emb.named_buffers())
    torch.testing.assert_close(after["full_attention_inv_freq"] * 4, before["full_attention_inv_freq"])
    assert torch.equal(after["sliding_attention_inv_freq"], before["sliding_attention_inv_freq"])


def test_precision_device_and_mode_are_those_of_the_model() -> None:
    model = made("Llama").to(torch.bfloat16).train()
    ScaledRope(model, "linear", 4.0)
    turn = model.model.rotary_emb
    assert turn.training
    assert turn.inv_freq.dtype == torch.float32, "the angles are exact, also where the model was rounded"
    with torch.device("meta"):
        shapes = made("Llama")
    ScaledRope(shapes.to("meta"), "linear", 4.0)
    assert shapes.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize("form", ["default", "linear"])
def test_a_base_that_divides_already_is_told_what_it_is_taken_to_read(form: str) -> None:
    rope = {"rope_type": form, "rope_theta": 10000.0} | ({"factor": 2.0} if form == "linear" else {})
    model = made("Llama", rope_parameters=rope)
    notes = lorary.plan(model, lorary.method("longlora", length=64, r=2)).notes
    told = "the base divides positions as it is: 16 is max_position_embeddings times its factor"
    assert (told in notes) is (form == "linear")


@pytest.mark.parametrize("known", [0, -4, "many", float("nan"), float("inf"), None])
@pytest.mark.parametrize("factor", [0, -2, "x", float("nan"), float("inf")])
def test_a_configuration_that_says_nonsense_says_nothing(known: Any, factor: Any) -> None:
    config = SimpleNamespace(max_position_embeddings=known, rope_parameters={"rope_type": "linear", "factor": factor})
    assert original_context(config) is None
    assert max_context(config) is None
    config.max_position_embeddings = 16
    assert max_context(config) == 16
