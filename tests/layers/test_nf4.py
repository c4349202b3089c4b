"""NF4Linear and NF4Embedding as modules: they compute with the dense weight, and move, copy and save as layers do."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.errors import MethodError
from lorary.layers.nf4 import NF4, NF4Embedding, NF4Linear
from lorary.layers.quantized_weight import stored_tensors, weight
from tests import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}
STATE = "weight.quant_state.bitsandbytes__nf4"


def linear(dtype: torch.dtype = torch.float32, storage: NF4 | None = None, bias: bool = True) -> Any:
    """A quantised layer [40, 72]: its rows do not end where its blocks do."""
    torch.manual_seed(0)
    return (storage or NF4()).quantize(nn.Linear(72, 40, bias=bias, dtype=dtype).requires_grad_(False))


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 72).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("storage", [NF4(), NF4(double=False), NF4(block=256)], ids=repr)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_forward_and_gradient_are_those_of_the_dense_weight(dtype: torch.dtype, storage: NF4, bias: bool) -> None:
    layer = linear(dtype, storage, bias)
    x = x_of(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(other, weight(layer), layer.bias)
    assert y.dtype == expected.dtype == dtype
    close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(y, expected, **close)
    gy = torch.randn_like(y)
    y.backward(gy)
    expected.backward(gy)
    torch.testing.assert_close(x.grad, other.grad, **close)
    assert all(t.grad is None and not t.requires_grad for t in layer.parameters())


def test_nothing_dense_is_kept_for_backward() -> None:
    layer = NF4().quantize(nn.Linear(512, 512, bias=False))
    x = torch.randn(2, 512, requires_grad=True)
    assert kept_for_backward(lambda: layer(x), beyond=[x, *stored_tensors(layer)]) == 0


def test_an_embedding_looks_up_rows_of_the_dense_table() -> None:
    layer: Any = NF4(embeddings=True).quantize(nn.Embedding(30, 24, padding_idx=3, dtype=torch.bfloat16))
    assert isinstance(layer, NF4Embedding)
    for ids in (torch.tensor([[3, 29, 0], [7, 7, 1]]), torch.tensor(5), torch.empty(0, 4, dtype=torch.long)):
        rows = layer(ids)
        assert rows.shape == (*ids.shape, 24)
        assert rows.dtype == torch.bfloat16
        assert torch.equal(rows, F.embedding(ids, weight(layer)))
    with pytest.raises(IndexError):
        layer(torch.tensor([30]))


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "like a tensor": lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    "float": lambda m: m.half().float(),
}


@pytest.mark.parametrize("move", MOVES)
def test_another_precision_changes_the_dense_weight_and_neither_codes_nor_scales(move: str) -> None:
    layer = linear()
    before = [t.clone() for t in stored_tensors(layer)]
    exact = weight(layer).double()
    assert MOVES[move](layer) is layer
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(stored_tensors(layer), before, strict=True))
    dtype = layer.bias.dtype
    assert (layer.dtype, weight(layer).dtype, layer(x_of(dtype)).dtype) == (dtype, dtype, dtype)
    assert torch.equal(weight(layer), exact.to(dtype))


def test_to_the_meta_device_and_empty_again() -> None:
    layer = linear().to("meta")
    assert all(t.is_meta for t in [*stored_tensors(layer), layer.bias])
    assert layer(x_of().to("meta")).shape == (3, 5, 40)
    there = layer.to_empty(device="cpu")
    assert not any(t.is_meta for t in stored_tensors(there))
    there.load_state_dict(linear().state_dict())
    assert torch.equal(weight(there), weight(linear()))


def test_copies_and_pickles_are_the_same_and_their_own() -> None:
    layer = linear(torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = x_of(torch.bfloat16)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is NF4Linear
        assert torch.equal(other(x), layer(x))
        assert (other.dtype, other.block, other.shape) == (layer.dtype, layer.block, layer.shape)
        assert not {t.data_ptr() for t in stored_tensors(other)} & {t.data_ptr() for t in stored_tensors(layer)}


def test_it_has_the_mode_of_what_it_was() -> None:
    layer = nn.Linear(8, 8).eval()
    assert not NF4().quantize(layer).training
    assert NF4().quantize(layer.train()).training


# --- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [NF4(), NF4(double=False), NF4(block=128)], ids=repr)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_state_dict_goes_and_comes_back(dtype: torch.dtype, storage: NF4) -> None:
    layer = linear(dtype, storage)
    state = layer.state_dict()
    nested = {"weight.nested_absmax", "weight.nested_quant_map"} if storage.double else set()
    assert state.keys() == {"weight", "bias", "weight.absmax", "weight.quant_map", STATE} | nested
    other: Any = storage.quantize(nn.Linear(72, 40))
    assert not torch.equal(weight(other), weight(layer).float())
    other.load_state_dict(state)
    assert torch.equal(weight(other), weight(layer))
    assert other.dtype == dtype
    assert not {t.data_ptr() for t in stored_tensors(other)} & {t.data_ptr() for t in stored_tensors(layer)}
    with torch.device("meta"):
        empty: Any = storage.quantize(nn.Linear(72, 40))
    empty.load_state_dict(state, assign=True)
    assert torch.equal(weight(empty), weight(layer))
    x = x_of(dtype)
    assert torch.equal(empty(x), layer(x))


def test_one_with_double_quantisation_reads_one_without() -> None:
    layer, other = linear(storage=NF4(double=False)), linear()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(weight(other), weight(layer))
    layer.load_state_dict(linear().state_dict())
    assert torch.equal(weight(layer), weight(linear()))


def _json(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        said = json.loads(bytes(state[STATE].tolist())) | changes
        text = json.dumps(said).encode()
        state[STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    return change


def _set(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(key, value)


def _without(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        del state[key]

    return change


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no codes": (_without("weight"), 'Missing key(s) in state_dict: "0.weight"'),
    "no absmax": (_without("weight.absmax"), "weight: absmax is missing"),
    "no nested": (_without("weight.nested_absmax"), "weight: nested_absmax is missing"),
    "no state": (_without(STATE), "weight: quant_state.bitsandbytes__nf4 is missing"),
    "no bias": (_without("bias"), 'Missing key(s) in state_dict: "0.bias"'),
    "stray": (_set("weight.stray", torch.zeros(1)), 'Unexpected key(s) in state_dict: "0.weight.stray"'),
    "dense": (
        lambda state: (state.clear(), state.update(nn.Linear(72, 40).state_dict()))[0],
        "weight: quant_state.bitsandbytes__nf4 is missing",
    ),
    "no JSON": (
        _set(STATE, torch.tensor([123], dtype=torch.uint8)),
        "weight: quant_state.bitsandbytes__nf4 is not valid JSON",
    ),
    "no text": (_set(STATE, torch.tensor([255, 200], dtype=torch.uint8)), "is not valid JSON"),
    "a list": (_set(STATE, torch.tensor([91, 93], dtype=torch.uint8)), "is not a JSON object"),
    "fp4": (_json(quant_type="fp4"), "quant_type is 'fp4'"),
    "shape": (_json(shape=[72, 40]), "holds (72, 40) in blocks of 64, expected (40, 72) in blocks of 64"),
    "no shape": (_json(shape="many"), "shape is 'many'"),
    "block": (_json(blocksize=48), "blocksize is 48"),
    "blocks": (_json(blocksize=128), "absmax is torch.uint8 (45,), expected torch.uint8 (23,)"),
    "dtype": (_json(dtype="int8"), "dtype is 'int8'"),
    "offset": (_json(nested_offset=None), "invalid double quantisation"),
    "few codes": (_set("weight", torch.zeros(7, 1, dtype=torch.uint8)), "expected 1440 bytes"),
    "float codes": (_set("weight", torch.zeros(1440, 1)), "the codes are torch.float32"),
    "values": (_set("weight.quant_map", torch.zeros(16)), "quant_map differs from the values of NF4"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_state_dict_is_refused_with_its_reason(case: str) -> None:
    layer, (change, what) = linear(), BAD[case]
    state = linear().state_dict()
    change(state)
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(layer).load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert what in str(caught.value)


def test_other_blocks_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"holds \(40, 72\) in blocks of 128, expected \(40, 72\) in blocks of 64"):
        linear().load_state_dict(linear(storage=NF4(block=128)).state_dict())


def test_a_whole_model_goes_and_comes_back() -> None:
    model, other = (lorary.quantize(tiny.seeded("LlamaForCausalLM", seed)) for seed in (0, 1))
    assert not torch.equal(tiny.logits(model), tiny.logits(other))
    other.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(model), tiny.logits(other))


# --- precision --------------------------------------------------------------------------------------------------------


def test_the_precision_of_the_product_can_be_said() -> None:
    layer = linear(storage=NF4(compute="bfloat16"))
    x = x_of().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    torch.testing.assert_close(y, linear()(x), rtol=0.02, atol=0.02)
    assert not torch.equal(y, linear()(x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"x is of torch\.int64"):
        layer(torch.ones(2, 72, dtype=torch.int64))


def test_autocast_decides_where_it_is_on() -> None:
    dense = nn.Linear(72, 40)
    for layer in (linear(), linear(storage=NF4(compute="float16"))):
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x_of()).dtype == dense(x_of()).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [{"block": 48}, {"block": True}, {"compute": "int8"}, {"double": 1}])
def test_words_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        lorary.method("qlora", r=2, **wrong)


# --- in a model -------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = tiny.shaken(_qlora(nn.Sequential(nn.Linear(72, 64), nn.Tanh(), nn.Linear(64, 40))))
    x = x_of()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def _qlora(model: nn.Module, **options: Any) -> nn.Module:
    return lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2, **options)))


def test_generation_with_a_cache_through_a_packed_llama() -> None:
    model = tiny.trained(tiny.seeded("LlamaForCausalLM"), lorary.method("qlora", r=2)).eval()
    ids = tiny.ids()[:, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    dense = lorary.merge(copy.deepcopy(model))
    assert torch.equal(cached, dense.generate(ids, **options))


def test_its_scales_are_buffers_that_move_but_are_not_trained_or_reduced() -> None:
    model = _qlora(nn.Sequential(nn.Linear(72, 40)))
    buffers = dict(model.named_buffers())
    assert {name.rpartition(".")[2] for name in buffers} == {"absmax", "nested_absmax", "nested_offset"}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"0.params.A", "0.params.B"}


@pytest.mark.parametrize("shape", [(3, 72), (40, 72), (2, 3, 72)])
def test_an_output_may_be_written_into(shape: tuple[int, ...]) -> None:
    """Llama 4 adds its routed experts into the output of a shared one."""
    x = torch.randn(*shape, requires_grad=True)
    y = linear()(x)
    y.add_(1.0)
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gx, torch.autograd.grad(linear()(x).sum(), x)[0])
