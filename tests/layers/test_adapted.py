"""Adapted: what foreign code sees of an adapted layer, and every way in which models are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model.state import base_parameter, state_of
from tests import tiny


def test_foreign_code_reads_the_geometry_of_a_layer() -> None:
    model = nn.ModuleDict(
        {"fc": nn.Linear(3, 5), "conv": nn.Conv2d(4, 8, 3, 2, 1, groups=2), "e": nn.Embedding(9, 4, 2)}
    )
    layers = dict(model.items())
    lorary.attach(model, lorary.plan(model, lorary.method(r=1), ["all-linear", "conv", "embedding"]))
    reads = {
        "fc": ("in_features", "out_features"),
        "conv": (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ),
        "e": ("num_embeddings", "embedding_dim", "padding_idx"),
    }
    for name, attributes in reads.items():
        for attribute in (*attributes, "weight", "bias"):
            if attribute != "bias" or name != "e":
                assert getattr(model[name], attribute) is getattr(layers[name], attribute)
    assert model["e"].bias is None


def test_a_models_own_padding_reads_the_convolution() -> None:
    """MobileNet pads by the stride and the window of the layer that it is about to call."""
    model = tiny.model("MobileNetV2ForImageClassification")
    x = torch.randn(1, 3, 32, 32)
    expected = tiny.logits(model, pixel_values=x)
    tiny.trained(model, lorary.method(r=1), "conv")
    merged = tiny.logits(model, pixel_values=x)
    assert not torch.equal(merged, expected)
    lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model, pixel_values=x), merged, rtol=1e-3, atol=1e-3)


def test_t5_reads_the_precision_of_an_adapted_weight() -> None:
    model = tiny.model("T5ForConditionalGeneration").to(torch.bfloat16)
    inputs = {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids()}
    expected = tiny.logits(model, **inputs)
    tiny.trained(model, targets=["wo", "wi"])
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    assert tiny.logits(model, **inputs).dtype == torch.bfloat16
    assert not torch.equal(tiny.logits(model, **inputs), expected)


def test_tying_again_after_attach_reaches_the_bases() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    tiny.trained(model, targets=["embedding", "lm_head"])
    expected = tiny.logits(model)
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.base.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(tiny.logits(model), expected)
    lorary.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_assigning_a_weight_assigns_the_bases() -> None:
    model = tiny.trained(nn.Sequential(nn.Linear(3, 3)), targets="0")
    other = nn.Parameter(torch.zeros(3, 3))
    model[0].weight, model[0].bias = other, None
    assert model[0].base.weight is other
    assert model[0].base.bias is None
    assert "weight" not in dict(model[0].named_parameters(recurse=False))


def test_resizing_the_vocabulary() -> None:
    free = tiny.trained(tiny.llama(), targets="q_proj")
    free.resize_token_embeddings(44)
    assert tiny.logits(free).shape[-1] == 44
    lorary.detach(free)
    adapted_table = tiny.trained(tiny.llama(), targets="embedding")
    with pytest.raises(TypeError, match=r"Old embeddings are of type <class 'lorary\.layers\.adapted\.Adapted'>"):
        adapted_table.resize_token_embeddings(44)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_may_change_its_precision_after_attach(cast: torch.dtype) -> None:
    model = tiny.trained(tiny.model("Qwen2ForCausalLM"), lorary.method("lora", "bitfit", r=2))
    base = tiny.model("Qwen2ForCausalLM")
    base.load_state_dict(_plain_values(model))
    model.to(cast)
    base.to(cast)
    out = tiny.logits(model)
    assert out.dtype == cast
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), tiny.logits(base))
    assert torch.equal(tiny.logits(model), out)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    assert {p.dtype for p in model.parameters()} == {cast}


def _plain_values(model: nn.Module) -> dict[str, Tensor]:
    """What the base would be after a detach, while something is attached."""
    kept = state_of(model).full  # type: ignore[union-attr]
    names = [name for name, _ in tiny.model("Qwen2ForCausalLM").named_parameters(remove_duplicate=False)]
    return {name: kept.get(name, base_parameter(model, name).detach()) for name in names}


# --- how models are run -----------------------------------------------------------------------------------------------


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = tiny.trained(tiny.llama(), lorary.method("lora", r=2, dropout=0.5)).train()
    inputs = {"input_ids": tiny.ids(), "labels": tiny.ids()}
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    expected = grads(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    model(**inputs, use_cache=False).loss.backward()
    got = grads(model)
    assert got.keys() == expected.keys() != set()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)


def test_autocast() -> None:
    model = tiny.trained(tiny.llama(), targets=["all-linear", "embedding", "lm_head"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        assert model(input_ids=tiny.ids()).logits.dtype == torch.bfloat16
    loss.backward()
    low = grads(model)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    for name, grad in grads(model).items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], grad, rtol=0.1, atol=0.05 * grad.abs().max().item())


METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dora": (("dora",), {"r": 2, "dropout": 0.5}),
    "dora, exact": (("dora",), {"r": 2, "exact": True}),
    "pissa, dora": (("pissa", "dora"), {"r": 2}),
    "vera": (("vera",), {"r": 6}),
    "vera, dora": (("vera", "dora"), {"r": 6, "dropout": 0.5}),
    "melora": (("melora",), {"r": 2, "n": 2, "dropout": 0.5}),
    "multilora": (("multilora",), {"r": 2, "n": 2, "alpha": 4.0}),
}


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_whatever_the_method(way: str, reentrant: bool) -> None:
    names, options = METHODS[way]
    model = tiny.trained(tiny.llama(), lorary.method(*names, **options), ["all-linear", "embedding"]).train()
    inputs = {"input_ids": tiny.ids(), "labels": tiny.ids()}
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    expected = grads(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    model(**inputs, use_cache=False).loss.backward()
    got = grads(model)
    assert got.keys() == expected.keys() != set()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)


@pytest.mark.parametrize("way", METHODS)
def test_autocast_whatever_the_method(way: str) -> None:
    names, options = METHODS[way]
    model = tiny.trained(tiny.llama(), lorary.method(*names, **{k: v for k, v in options.items() if k != "dropout"}))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(input_ids=tiny.ids(), labels=tiny.ids())
    full = model(input_ids=tiny.ids(), labels=tiny.ids())
    assert low.logits.dtype == torch.bfloat16
    torch.testing.assert_close(low.loss, full.loss, rtol=0.05, atol=0.05)
    low.loss.backward()
    found = grads(model)
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    full.loss.backward()
    exact = torch.cat([grad.flatten() for grad in grads(model).values()])
    assert (torch.cat([grad.flatten() for grad in found.values()]) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("way", METHODS)
def test_generation_whatever_the_method(way: str) -> None:
    names, options = METHODS[way]
    model = tiny.trained(tiny.llama(), lorary.method(*names, **options)).eval()
    prompt = tiny.ids()[:, :2]
    chosen = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(prompt, use_cache=cache, **chosen) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("way", METHODS)
def test_a_state_dict_comes_back_whatever_the_method(way: str) -> None:
    names, options = METHODS[way]
    model = tiny.trained(tiny.llama(), lorary.method(*names, **options)).eval()
    values, expected = tiny.frozen_copy(model), tiny.logits(model)
    tiny.shaken(model, seed=9)
    assert not torch.equal(tiny.logits(model), expected)
    model.load_state_dict(values)
    assert torch.equal(tiny.logits(model), expected)


def test_what_all_layers_share_is_no_part_of_a_state_dict() -> None:
    """It is one for the whole model, and never trains: a checkpoint would hold it once for every layer."""
    model = tiny.trained(tiny.llama(), lorary.method("vera", r=6))
    assert not [name for name in model.state_dict() if "shared" in name]
    assert len({id(b) for name, b in model.named_buffers() if "shared" in name}) == 2


def test_inference_mode() -> None:
    model = tiny.trained(tiny.llama())
    expected = tiny.logits(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tiny.ids()).logits, expected)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()


def test_generation_with_a_cache() -> None:
    model = tiny.trained(tiny.llama())
    prompt = tiny.ids()[:, :2]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_compiled_and_switched_off() -> None:
    model = tiny.trained(tiny.ConvNet(), targets=["conv", "all-linear"]).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with lorary.disabled(model):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_a_state_dict_comes_back() -> None:
    model = tiny.trained(tiny.llama())
    values = tiny.frozen_copy(model)
    expected = tiny.logits(model)
    tiny.shaken(model)
    model.load_state_dict(values)
    assert torch.equal(tiny.logits(model), expected)


def test_hooks_of_a_layer_act_on_the_adapted_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, x, y: seen.append(module))
    tiny.trained(model, targets="0")
    model(torch.zeros(1, 3))
    assert [type(m) for m in seen] == [Adapted]


def test_a_forward_that_was_replaced_is_the_bases() -> None:
    """Device-placing libraries replace `forward` on the layer itself."""
    layer = nn.Linear(3, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]
    model = nn.Sequential(layer)
    x = torch.randn(2, 3)
    expected = model(x)
    lorary.attach(model, lorary.plan(model, tiny.LORA, "0"))
    assert torch.equal(model(x), expected)
    tiny.shaken(model)
    assert not torch.equal(model(x), expected)


def test_what_an_adapted_layer_says_of_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    lorary.attach(model, lorary.plan(model, tiny.LORA, "0"))
    assert isinstance(model[0], Adapted)
    assert repr(model[0]).splitlines()[1] == "  0, r=2, s=4"


def test_a_layer_follows_its_method() -> None:
    """What the method says is resolved when it is set: nothing stale is left of the one before."""
    model = nn.ModuleDict({"fc": nn.Linear(3, 5)})
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2)))
    layer = adapted_layers(model)["fc"]
    plain = lorary.method("lora", r=1)
    layer.method = plain
    assert (layer.method, layer.delta, layer.init, layer.join) == (plain, plain.delta, plain.init, plain.join)
