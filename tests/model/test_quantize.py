"""lorary.quantize and lorary.dequantize: the layers that are quantised, and nothing else changes."""

from __future__ import annotations

import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.errors import StateError
from lorary.kernels.nf4 import CODE
from lorary.layers.nf4 import NF4, NF4Embedding, NF4Experts, NF4Linear
from lorary.layers.quantized_weight import is_quantized, stored_tensors, weight
from lorary.model.quantize import with_progress
from tests import tiny


def quantised_names(model: nn.Module) -> list[str]:
    """The last names of the layers that are quantised, each once."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_quantized(m)})


LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LlamaForCausalLM", LLAMA),
        ("GPT2LMHeadModel", ["c_attn", "c_fc", "c_proj"]),
        # `wo` is wanted in 32 bits
        ("T5ForConditionalGeneration", ["k", "o", "q", "v", "wi"]),
        ("BertForSequenceClassification", ["dense", "key", "query", "value"]),
        ("ViTForImageClassification", None),
        ("MixtralForCausalLM", ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]),
    ],
)
def test_every_linear_layer_but_the_head(name: str, expected: list[str] | None) -> None:
    model = tiny.seeded(name)
    before = {n: (type(m), dict(m.named_parameters(recurse=False))) for n, m in model.named_modules()}
    assert lorary.quantize(model) is model
    found = quantised_names(model)
    assert expected is None or found == expected
    assert found
    assert not {"lm_head", "classifier", "score", "pooler", "wo"} & set(found)
    for path, module in model.named_modules():
        if isinstance(module, NF4Experts):
            assert path.rpartition(".")[2] in before[path.rpartition(".")[0]][1]  # a parameter before
            continue
        was, parameters = before[path]
        if path.endswith(".experts"):
            parameters = {}  # layers now
        if is_quantized(module):
            assert (was.__name__ in ("Linear", "Conv1D"), type(module)) == (True, NF4Linear), path
            assert module.bias is parameters.get("bias"), path
        else:  # the very same parameters
            assert type(module) is was, path
            assert dict(module.named_parameters(recurse=False)).keys() == parameters.keys()
            assert all(p is parameters[n] for n, p in module.named_parameters(recurse=False)), path
    assert all(not p.requires_grad for m in model.modules() if is_quantized(m) for p in [m.weight])


def test_the_encoder_of_a_classifier_is_quantised_and_its_new_head_is_not() -> None:
    model = lorary.quantize(tiny.seeded("BertForSequenceClassification"))
    assert type(model.classifier) is nn.Linear
    assert isinstance(model.bert.encoder.layer[0].output.dense, NF4Linear)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_on_request_unless_they_are_tied(tied: bool) -> None:
    model = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=tied)
    table = model.model.embed_tokens.weight.detach().clone()
    lorary.quantize(model, NF4(embeddings=True))
    layer = model.model.embed_tokens
    assert isinstance(layer, NF4Embedding) is not tied
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is layer.weight) is tied
    if not tied:
        ids = tiny.ids()
        assert torch.equal(layer(ids), weight(layer)[ids])
        assert 0 < (weight(layer) - table).abs().max() < 0.2 * table.abs().max()
        assert tiny.logits(model).isfinite().all()
        assert not is_quantized(lorary.dequantize(model).model.embed_tokens)
        assert type(model.model.embed_tokens) is nn.Embedding
        assert model.model.embed_tokens.padding_idx == layer.padding_idx


def test_embeddings_that_compute_something_of_their_own_stay() -> None:
    model = lorary.quantize(tiny.seeded("Gemma3ForCausalLM", tie_word_embeddings=False), NF4(embeddings=True))
    assert not is_quantized(model.model.embed_tokens)  # it multiplies by the root of its width


class Odd(nn.Module):
    """Layers whose weights PyTorch reads without calling them, beside one that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.linear(self.encoder(x))
        return y


def test_weights_that_other_modules_read_stay() -> None:
    model = Odd().eval()
    lorary.quantize(model)
    assert [name for name, m in model.named_modules() if is_quantized(m)] == ["linear"]
    assert model(torch.randn(2, 3, 8)).isfinite().all()


class Shared(nn.Module):
    """One layer under two paths, and a third whose weight is tied to a fourth's."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.a])
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.again[0](x) + self.b(x) + self.c(x)
        return y


def test_a_layer_under_two_paths_is_quantised_once_and_tied_weights_are_not() -> None:
    model = lorary.quantize(Shared())
    assert isinstance(model.a, NF4Linear)
    assert model.again[0] is model.a
    assert type(model.b) is nn.Linear
    assert model.c.weight is model.b.weight
    lorary.dequantize(model)
    assert type(model.a) is nn.Linear
    assert model.again[0] is model.a


def test_gpt2s_transposed_layer_is_quantised_as_the_matrix_that_it_is() -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    W = model.transformer.h[0].attn.c_attn.weight.detach().T.contiguous()
    lorary.quantize(model)
    layer = model.transformer.h[0].attn.c_attn
    assert torch.equal(weight(layer), weight(NF4().quantize(_linear(W))))
    expected = tiny.logits(model)
    lorary.dequantize(model)
    plain = model.transformer.h[0].attn.c_attn
    assert torch.equal(plain.weight, weight(NF4().quantize(_linear(W))).T)
    torch.testing.assert_close(tiny.logits(model), expected)


@pytest.mark.parametrize("back", [lorary.merge, lorary.detach])
def test_what_has_been_gpt2s_layer_becomes_that_again(back: Callable[[nn.Module], nn.Module]) -> None:
    """A file of the model would else hold its weights the wrong way round, unnoticed where they are square."""
    model = tiny.seeded("GPT2LMHeadModel")
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "pissa", r=2)))
    expected = tiny.logits(model)
    state = back(model).state_dict()
    again = tiny.model("GPT2LMHeadModel")
    again.load_state_dict(state)
    torch.testing.assert_close(tiny.logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [("qlora",), ("qlora", "pissa")])
def test_no_dense_weight_outlives_the_quantising(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is done it can be undone, bit for bit, and then all of them go, though nothing collects garbage."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)), nn.Linear(128, 4))
    dense = [weakref.ref(layer.weight) for layer in model]
    left, quantize = [], NF4.quantize

    def counted(self: NF4, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        left.append(sum(ref() is not None for ref in dense))
        return quantize(self, layer, W)

    monkeypatch.setattr(NF4, "quantize", counted)
    lorary.attach(model, lorary.plan(model, lorary.method(*words, r=2), ["0", "2"]))
    assert left == [5, 5, 5, 5, 5]
    assert not any(ref() is not None for ref in dense)


def _linear(W: Tensor, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


def test_a_model_on_the_meta_device_is_quantised_in_shapes() -> None:
    model = lorary.quantize(tiny.model("LlamaForCausalLM", "meta"))
    real = lorary.quantize(tiny.seeded("LlamaForCausalLM"))
    for (name, here), there in zip(model.named_modules(), real.modules(), strict=True):
        assert type(here) is type(there), name
        if is_quantized(here):
            assert [(t.shape, t.dtype) for t in stored_tensors(here)] == [
                (t.shape, t.dtype) for t in stored_tensors(there)
            ], name
            assert all(t.is_meta for t in stored_tensors(here))
    assert model(tiny.ids().to("meta")).logits.shape == (2, 5, 40)


def test_what_cannot_be_quantised_is_refused_with_every_reason_and_nothing_changes() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = math.nan
        model.model.layers[1].mlp.up_proj.weight[1, :2] = math.inf
    before = tiny.everything(model)
    with pytest.raises(StateError) as caught:
        lorary.quantize(model)
    what = "numbers of its weight are NaN or infinite, and cannot be quantised"
    fix = "      hint: repair the base, or leave the layer out"
    assert str(caught.value).splitlines() == [
        "cannot quantise:",
        f"  - model.layers.0.self_attn.q_proj: 1 of 256 {what}",
        fix,
        f"  - model.layers.1.mlp.up_proj: 2 of 384 {what}",
        fix,
    ]
    assert tiny.everything(model) == before


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda: (lorary.quantize(tiny.llama()),), "model: has no plain linear layer to quantise"),
        (lambda: (nn.Linear(4, 4).weight,), "model: is a Parameter"),
        (
            lambda: (nn.Linear(4, 4),),
            "model: is a single Linear\n      hint: put it into a module: nn.Sequential(layer)",
        ),
        (
            lambda: (nn.Sequential(nn.LazyLinear(4)),),
            "0.weight: has no shape before the model has seen its first input",
        ),
        (lambda: (tiny.llama(), NF4), "layers.nf4.NF4'> does not quantise\n      hint: pass NF4()"),
        (
            lambda: (tiny.llama(), NF4(block=8192)),
            "storage: NF4 has block = 8192; it takes a power of two from 32 to 4096",
        ),
        (
            lambda: (tiny.llama(), NF4(compute="fp16")),
            "storage: NF4 has compute = 'fp16'; it takes float32 or bfloat16",
        ),
        (lambda: (nn.Sequential(nn.Conv1d(2, 2, 1)),), "model: has no plain linear layer to quantise"),
        (
            lambda: (tiny.llama(), lorary.method("lora").storage),
            "storage: Unquantized() does not quantise\n      hint: pass NF4()",
        ),
        (lambda: (tiny.llama(), "nf4"), "storage: 'nf4' does not quantise\n      hint: pass NF4()"),
        (lambda: (tiny.trained(tiny.llama()),), "model: has adapters attached\n      hint: detach them first"),
    ],
)
def test_refusals(wrong: Callable[[], tuple[Any, ...]], what: str) -> None:
    with pytest.raises(StateError) as caught:
        lorary.quantize(*wrong())
    assert what in str(caught.value)


def test_dequantising_wants_no_adapters_either() -> None:
    with pytest.raises(StateError, match=r"has adapters attached\s+hint: merge or detach them first"):
        lorary.dequantize(tiny.trained(tiny.llama(), lorary.method("qlora", r=2)))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_dequantised_it_is_a_plain_model_that_computes_the_same(dtype: torch.dtype | None) -> None:
    model = lorary.quantize(tiny.seeded("Qwen2ForCausalLM").to(torch.bfloat16))
    expected = tiny.logits(model)
    dense = {name: weight(m) for name, m in model.named_modules() if is_quantized(m)}
    assert lorary.dequantize(model, dtype) is model
    assert not quantised_names(model)
    for name, W in dense.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, W.to(dtype or torch.bfloat16))
        assert not layer.training
        assert not layer.weight.requires_grad
    if dtype is None:
        torch.testing.assert_close(tiny.logits(model), expected, rtol=0.02, atol=0.02)
    assert lorary.dequantize(model) is model  # nothing is left to do


def test_an_adapter_of_the_plain_model_fits_the_quantised_one() -> None:
    plain, quantised = tiny.seeded("LlamaForCausalLM"), lorary.quantize(tiny.seeded("LlamaForCausalLM"))
    assert lorary.Fingerprint.of(quantised) == lorary.Fingerprint.of(plain)
    adapter = lorary.Adapter.of(tiny.trained(plain))
    base = tiny.logits(quantised)
    lorary.switch(quantised, adapter)
    assert (tiny.logits(quantised) - base).abs().max() > 1e-3
    assert torch.equal(tiny.logits(lorary.detach(quantised)), base)


def _made(layers: int, *, attach: bool) -> tuple[int, int]:
    """(the most bytes alive, those alive at the end) of quantising so many layers [512, 512]."""
    model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(layers)])
    plan = lorary.plan(model, lorary.method("qlora", r=1)) if attach else None
    with LiveBytes() as live:
        if plan is None:
            lorary.quantize(model)
        else:
            lorary.attach(model, plan)
    return live.peak, live.now


@pytest.mark.parametrize("attach", [False, True])
def test_quantising_takes_the_scratch_of_one_layer_whatever_their_number(attach: bool) -> None:
    one, several = _made(1, attach=attach), _made(6, attach=attach)
    quantised = NF4().bytes(512 * 512) + (1024 * 4 if attach else 0)
    assert several[1] - one[1] == 5 * quantised
    assert several[0] - one[0] <= 5 * quantised + 10_000  # the dense layers take 1 MB each


def test_the_tensors_of_a_quantised_layer_take_4_127_bits_a_number() -> None:
    layer = NF4().quantize(nn.Linear(1024, 2048, bias=False))
    stored = sum(t.untyped_storage().nbytes() for t in stored_tensors(layer))
    bits = 8 * stored / (1024 * 2048)
    # 4 + 8 / 64 + 32 / (64 * 256), and 32 bits of the offset
    assert bits == 4 + 8 / 64 + 32 / (64 * 256) + 32 / (1024 * 2048)
    assert abs(bits - 4.12695) < 2e-5
    assert stored == NF4().bytes(1024 * 2048)
    single = NF4(double=False).quantize(nn.Linear(1024, 2048, bias=False))
    assert 8 * sum(t.untyped_storage().nbytes() for t in stored_tensors(single)) / (1024 * 2048) == 4.5
    model = lorary.quantize(tiny.seeded("LlamaForCausalLM"))
    kept = sum(t.untyped_storage().nbytes() for m in model.modules() if is_quantized(m) for t in stored_tensors(m))
    assert kept == sum(NF4().bytes(m.in_features * m.out_features) for m in model.modules() if is_quantized(m))
    assert CODE.numel() == 16


def test_nothing_to_quantise_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a plain adapter on a terminal once left a bar "quantising" behind."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    assert list(with_progress([], "quantising")) == []
    assert shown.getvalue() == ""
    assert list(with_progress([1], "quantising")) == [1]
    assert "quantising" in shown.getvalue()
