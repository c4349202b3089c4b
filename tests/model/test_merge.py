"""merge and unmerge: all or nothing, rounded once, tied embeddings, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from lorary.model.state import state_of
from tests import architectures, tiny


def refused(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(StateError) as refusal:
        action(*arguments, **options)
    return str(refusal.value)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_merged_is_unmerged(name: str) -> None:
    model = tiny.model(name)
    inputs: dict[str, Any] = {"input_ids": tiny.ids()}
    if name.startswith("T5"):
        inputs["decoder_input_ids"] = tiny.ids()
    if name.startswith("MobileNet"):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    tiny.trained(model, lorary.method("lora", r=2, alpha=1.0), tiny.MODELS[name])
    expected = tiny.logits(model, **inputs)
    classes = [type(m) for m in lorary.detach(copy.deepcopy(model)).modules()]
    assert lorary.merge(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert state_of(model) is None
    assert not adapted_layers(model)
    got = tiny.logits(model, **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(dtype: torch.dtype) -> None:
    model = tiny.trained(nn.Sequential(nn.Linear(12, 8)).to(dtype), targets="0")
    layer = adapted_layers(model)["0"]
    B, A = (layer.params[role].detach().double() for role in "BA")
    exact = (layer.weight.detach().double() + layer.scale * B @ A).to(torch.float32)
    lorary.merge(model)
    assert model[0].weight.dtype == dtype
    assert not model[0].weight.requires_grad
    off = (model[0].weight.float() - exact).abs()
    assert (off <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_and_unmerged_again_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny.model("BertForSequenceClassification").to(dtype)
    tiny.trained(model, lorary.method("lora", "bitfit", r=2), ["all-linear", "embedding"])
    before, values, expected = tiny.everything(model), tiny.frozen_copy(model), tiny.logits(model)
    for _ in range(3):
        lorary.merge(model, keep=True)
        assert not adapted_layers(model)
        assert lorary.unmerge(model) is model
        assert tiny.everything(model) == before
        assert tiny.same(tiny.frozen_copy(model), values)
        assert torch.equal(tiny.logits(model), expected)
    lorary.detach(model)


def test_the_model_may_change_while_it_is_merged() -> None:
    model = tiny.llama(tie_word_embeddings=True).train()
    tiny.trained(model, lorary.method("lora", r=2, dropout=0.5), ["all-linear", "embedding"])
    before = tiny.everything(model)
    lorary.merge(model, keep=True)
    model.eval().to(torch.bfloat16)
    lorary.unmerge(model)
    assert {m.training for m in model.modules()} == {False}
    assert {p.dtype for p in lorary.detach(model).parameters()} == {torch.bfloat16}
    assert torch.equal(tiny.logits(model), tiny.logits(model))
    assert [row[1] for row in before[1] if ".params." not in row[0]] == [
        id(p) for _, p in model.named_parameters(remove_duplicate=False)
    ]


def test_one_weight_that_is_not_finite_and_nothing_is_merged() -> None:
    model = tiny.trained(tiny.llama())
    with torch.no_grad():
        adapted_layers(model)["model.layers.1.mlp.up_proj"].params["B"][3, 1] = float("inf")
        adapted_layers(model)["model.layers.0.self_attn.k_proj"].params["A"][0, 0] = float("nan")
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    for keep in (False, True):
        assert refused(lorary.merge, model, keep=keep) == (
            "cannot merge:\n"
            "  - model.layers.0.self_attn.k_proj: merged, the weight is not finite in torch.float32\n"
            "  - model.layers.1.mlp.up_proj: merged, the weight is not finite in torch.float32"
        )
    assert tiny.everything(model) == before
    after = tiny.frozen_copy(model)
    assert all(torch.equal(after[k].nan_to_num(), values[k].nan_to_num()) for k in values)
    lorary.detach(model)


def test_a_weight_that_overflows_when_it_is_rounded() -> None:
    model = tiny.trained(nn.Sequential(nn.Linear(4, 4)).half(), targets="0")
    with torch.no_grad():
        adapted_layers(model)["0"].params["B"].mul_(1e6)
    assert refused(lorary.merge, model) == "cannot merge:\n  - 0: merged, the weight is not finite in torch.float16"


def test_merging_twice() -> None:
    model = tiny.trained(tiny.llama())
    lorary.merge(model, keep=True)
    message = "cannot merge:\n  - model: the adapter is merged\n      hint: unmerge it first"
    assert refused(lorary.merge, model) == message
    for action, verb in ((lorary.detach, "detach"), (Adapter.of, "take from the model")):
        assert refused(action, model) == message.replace("merge:", f"{verb}:", 1)
    assert refused(lorary.switch, model, None) == message.replace("merge:", "switch:", 1)
    lorary.unmerge(model)
    lorary.merge(model)
    assert "nothing to merge" in refused(lorary.merge, model)


@pytest.mark.parametrize("merged", [False, True])
def test_unmerging_what_was_not_kept(merged: bool) -> None:
    model = tiny.trained(tiny.llama())
    if merged:
        lorary.merge(model)
    assert refused(lorary.unmerge, model) == (
        "cannot unmerge:\n"
        "  - model: nothing is merged here, or the merge did not keep what it replaced\n"
        "      hint: merge with keep=True"
    )


def test_fully_trained_parameters_stay_where_they_are() -> None:
    model = tiny.trained(tiny.model("BertForSequenceClassification"), lorary.method("bitfit"))
    tuned = tiny.logits(model)
    lorary.merge(model)
    assert state_of(model) is None
    assert torch.equal(tiny.logits(model), tuned)


def test_a_merged_model_can_be_attached_to_again() -> None:
    model = tiny.trained(tiny.llama())
    lorary.merge(model)
    expected = tiny.logits(model)
    tiny.trained(model)
    assert not torch.equal(tiny.logits(model), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), expected)


def test_merging_a_shared_layer() -> None:
    model, x = tiny.Twice(), torch.randn(2, 4)
    tiny.trained(model, targets="a")
    expected = model(x)
    lorary.merge(model, keep=True)
    assert model.a is model.inner[0]
    assert model.a.weight is not model.c.weight
    torch.testing.assert_close(model(x), expected)
    lorary.unmerge(model)
    assert torch.equal(model(x), expected)
    assert model.a.weight is model.c.weight


# --- tied embeddings --------------------------------------------------------------------------------------------------

TIED: list[tuple[str, Any]] = [
    ("LlamaForCausalLM", "embedding"),
    ("LlamaForCausalLM", "lm_head"),
    ("LlamaForCausalLM", ["embedding", "lm_head"]),
    ("GPT2LMHeadModel", "embedding"),
    ("GPT2LMHeadModel", "lm_head"),
    ("Gemma3ForCausalLM", "embedding"),
    ("T5ForConditionalGeneration", "embedding"),
    ("T5ForConditionalGeneration", "lm_head"),
    ("T5ForConditionalGeneration", "decoder.embed_tokens"),
    ("BertForMaskedLM", "embedding"),
    ("BertForMaskedLM", "decoder"),
    ("BartForConditionalGeneration", ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]),
    ("BartForConditionalGeneration", "lm_head"),
]


@pytest.mark.parametrize(("name", "targets"), TIED)
def test_tied_embeddings(name: str, targets: Any, tmp_path: Path) -> None:
    """Adapted in one of its uses: merged is unmerged, saved and loaded is merged, and unmerged is as before."""
    model = tiny.model(name, tie_word_embeddings=True)
    if name == "BertForMaskedLM":
        nn.init.normal_(model.cls.predictions.bias)  # tied to the decoder's, too
    inputs = {"input_ids": tiny.ids()} | ({"decoder_input_ids": tiny.ids()} if name.startswith("T5") else {})
    base = tiny.logits(model, **inputs)
    tiny.trained(model, tiny.LORA, targets)
    before, expected = tiny.everything(model), tiny.logits(model, **inputs)
    assert not torch.allclose(expected, base, rtol=0.01)
    lorary.merge(model, keep=True)
    merged = tiny.logits(model, **inputs)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not model.config.tie_word_embeddings
    model.tie_weights()  # nothing may tie them again
    assert torch.equal(tiny.logits(model, **inputs), merged)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, **inputs), merged)
    lorary.unmerge(model)
    assert model.config.tie_word_embeddings
    assert tiny.everything(model) == before
    assert torch.equal(tiny.logits(model, **inputs), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model, **inputs), base)


WAYS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dora": (("dora",), {"r": 2}),
    "pissa": (("pissa",), {"r": 2}),
    "olora, dora": (("olora", "dora"), {"r": 2}),
    "vera": (("vera",), {"r": 8}),
    "vera, dora": (("vera", "dora"), {"r": 8}),
    "melora": (("melora",), {"r": 2, "n": 2}),
    "multilora": (("multilora",), {"r": 2, "n": 2}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "targets"),
    [row for row in TIED if row[0] in ("LlamaForCausalLM", "T5ForConditionalGeneration")]
    + [("GPT2LMHeadModel", ["attention-qv", "lm_head"]), ("BertForMaskedLM", ["attention", "decoder"])],
)
def test_tied_embeddings_whatever_the_method(way: str, name: str, targets: Any, tmp_path: Path) -> None:
    """Merged is unmerged, what is saved of it is what is loaded, unmerged is as before, and detached is the base."""
    names, options = WAYS[way]
    model = tiny.model(name, tie_word_embeddings=True)
    inputs = {"input_ids": tiny.ids()} | ({"decoder_input_ids": tiny.ids()} if name.startswith("T5") else {})
    base, plain, values = tiny.logits(model, **inputs), tiny.everything(model), tiny.frozen_copy(model)
    tiny.trained(model, lorary.method(*names, **options), targets)
    before, expected = tiny.everything(model), tiny.logits(model, **inputs)
    for _ in range(2):
        lorary.merge(model, keep=True)
        merged = tiny.logits(model, **inputs)
        torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert not model.config.tie_word_embeddings
        model.tie_weights()
        assert torch.equal(tiny.logits(model, **inputs), merged)
        lorary.unmerge(model)
        assert tiny.everything(model) == before
        assert torch.equal(tiny.logits(model, **inputs), expected)
        with lorary.disabled(model):
            assert torch.equal(tiny.logits(model, **inputs), base)
    twin = copy.deepcopy(model)
    lorary.merge(twin)
    twin.save_pretrained(tmp_path)
    loaded = type(twin).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, **inputs), tiny.logits(twin, **inputs))
    torch.testing.assert_close(tiny.logits(loaded, **inputs), merged)
    lorary.detach(model)
    assert tiny.everything(model) == plain
    assert tiny.same(tiny.frozen_copy(model), values)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("way", WAYS)
def test_a_merged_base_in_16_bits_is_rounded_once(way: str) -> None:
    names, options = WAYS[way]
    model = tiny.trained(tiny.llama().to(torch.bfloat16), lorary.method(*names, **options), dtype=torch.float32)
    exact = {name: layer.merged()[0] for name, layer in adapted_layers(model).items()}
    assert {W.dtype for W in exact.values()} == {torch.float32}
    lorary.merge(model)
    for name, W in exact.items():
        assert torch.equal(model.get_submodule(name).weight, W.bfloat16())


@pytest.mark.parametrize("way", WAYS)
def test_unmerged_in_another_precision(way: str) -> None:
    names, options = WAYS[way]
    model = tiny.trained(tiny.llama(tie_word_embeddings=True), lorary.method(*names, **options), ["mlp", "lm_head"])
    low = copy.deepcopy(model).to(torch.bfloat16)
    lorary.merge(model, keep=True)
    model.to(torch.bfloat16)
    lorary.unmerge(model)
    assert {p.dtype for n, p in model.named_parameters() if ".params." not in n} == {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(model).float(), tiny.logits(low).float(), rtol=0.1, atol=0.1)


def test_a_merge_elsewhere_leaves_tied_embeddings_tied(tmp_path: Path) -> None:
    model = tiny.trained(tiny.llama(tie_word_embeddings=True))
    lorary.merge(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path).eval()), tiny.logits(model))


# --- cases from the field ---------------------------------------------------------------------------------------------


def test_nan_in_the_very_last_layer_and_no_layer_before_it_is_merged() -> None:
    model = tiny.trained(tiny.llama(), targets=["q_proj", "v_proj"])
    site = "model.layers.1.self_attn.v_proj"
    with torch.no_grad():
        adapted_layers(model)[site].params["B"][0, 0] = float("nan")
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    for keep in (False, True):
        assert refused(lorary.merge, model, keep=keep) == (
            f"cannot merge:\n  - {site}: merged, the weight is not finite in torch.float32"
        )
    assert tiny.everything(model) == before
    assert all(t.equal(values[k]) for k, t in model.state_dict().items() if not k.endswith("v_proj.params.B"))
    with torch.no_grad():
        adapted_layers(model)[site].params["B"][0, 0] = 0
    expected = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(lorary.merge(model)), expected, rtol=1e-4, atol=1e-5)


def test_a_base_in_16_bits_and_an_adapter_in_32_are_rounded_once() -> None:
    """round(W + s B A), which is not round(W) + round(s B A); and ten rounds change not one bit."""
    model = tiny.trained(tiny.llama().to(torch.bfloat16), dtype=torch.float32)
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    once, twice = {}, {}
    for name, layer in adapted_layers(model).items():
        W, update = layer.weight.detach(), layer.scale * layer.params["B"].detach() @ layer.params["A"].detach()
        assert (W.dtype, update.dtype) == (torch.bfloat16, torch.float32)
        once[name], twice[name] = (W.float() + update).bfloat16(), W + update.bfloat16()
    for _ in range(10):
        lorary.merge(model, keep=True)
        merged = {name: model.get_submodule(name).weight for name in once}
        assert all(torch.equal(W, once[name]) for name, W in merged.items())
        assert not any(torch.equal(W, twice[name]) for name, W in merged.items())
        lorary.unmerge(model)
        assert tiny.everything(model) == before
        assert tiny.same(tiny.frozen_copy(model), values)


def test_a_frozen_base_with_checkpointing_learns_everywhere_and_generates_as_merged_with_left_padding() -> None:
    model = tiny.seeded("LlamaForCausalLM", pad_token_id=0)
    lorary.attach(model, lorary.plan(model, tiny.LORA))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    model.enable_input_require_grads()
    model(input_ids=tiny.ids(), labels=tiny.ids(), use_cache=False).loss.backward()
    gradients = [layer.params["B"].grad for layer in adapted_layers(model).values()]
    assert len(gradients) == 14
    assert all(grad is not None and grad.any() for grad in gradients)
    tiny.shaken(model.eval())  # which checkpoints nothing
    prompt = [7, 5, 2]
    ids = torch.tensor([[0, 0, *prompt], [3, 9, 11, 4, 38]])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "eos_token_id": None}
    mask = (torch.arange(5) >= torch.tensor([[2], [0]])).long()
    live = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3).long(), **options)
    assert torch.equal(live[0, 5:], alone[0, 3:])  # the padding changes nothing
    lorary.merge(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), live)


def test_a_part_that_ties_weights_by_its_own_configuration_is_untied(tmp_path: Path) -> None:
    """BLIP's text decoder is a model with a configuration of its own, which ties its head to its embeddings."""
    model = architectures.model("BlipForConditionalGeneration").eval()
    head = "text_decoder.cls.predictions.decoder"
    lorary.attach(model, lorary.plan(model, tiny.LORA, [head]))
    tiny.shaken(model)
    assert model.config.text_config.tie_word_embeddings
    lorary.merge(model, keep=True)
    assert not model.config.text_config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())
    assert not torch.equal(saved[f"{head}.weight"], saved["text_decoder.bert.embeddings.word_embeddings.weight"])
    lorary.unmerge(model)
    assert model.config.text_config.tie_word_embeddings
    layer = model.get_submodule(head)
    assert layer.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
