"""nn.MultiheadAttention: its projections as sites, with and without PyTorch's fused paths."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import LoraryError, MethodError, PlanError
from lorary.model.scan import scan
from tests import tiny

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False},
    "keys of its own": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 10, "batch_first": True, "add_bias_kv": True},
}
LORA = lorary.method("lora", r=2)


def filled(model: nn.Module, targets: Any = "all-linear", method: lorary.Method = LORA) -> nn.Module:
    """The model with an adapter that has numbers."""
    lorary.attach(model, lorary.plan(model, method, targets=targets))
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(torch.randn(p.shape, generator=random) * 0.1)


def calls(attention: Any) -> Any:
    """(inputs, options) of forward: with and without a batch, of the same and of different inputs, of every mask."""
    L, N = 5, 3
    random = torch.Generator().manual_seed(0)
    for batched, same, weights, average in itertools.product((True, False), repeat=4):
        if same and attention.in_proj_weight is None:
            continue
        S = L if same else 4

        def make(length: int, width: int, batched: bool = batched) -> Tensor:
            x = torch.randn(N, length, width, generator=random)
            return x[0] if not batched else x if attention.batch_first else x.transpose(0, 1)

        query, key, value = make(L, 8), make(S, attention.kdim), make(S, attention.vdim)
        inputs = (query, query, query) if same else (query, key, value)
        options = {"need_weights": weights, "average_attn_weights": average}
        keep = torch.rand(L, S, generator=random) > 0.8
        keep[:, 1] = False
        padding = torch.zeros(N, S, dtype=torch.bool)
        padding[1, -1] = True
        padding = padding if batched else padding[1]
        yield inputs, options
        yield inputs, options | {"attn_mask": keep, "key_padding_mask": padding}
        numbers = torch.randn(2 * (N if batched else 1), L, S, generator=random)
        yield inputs, options | {"attn_mask": numbers}
        if same:
            yield inputs, options | {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True}


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_it_computes_what_pytorch_does(kind: str) -> None:
    plain = nn.MultiheadAttention(8, 2, **KINDS[kind]).eval()
    adapted = copy.deepcopy(plain)
    lorary.attach(adapted, lorary.plan(adapted, LORA))
    for inputs, options in calls(plain):
        for mine, its in zip(adapted(*inputs, **options), plain(*inputs, **options), strict=True):
            assert (mine is None) == (its is None)
            if its is not None:
                assert mine.shape == its.shape
                torch.testing.assert_close(mine, its, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_detached_copied_and_pickled(kind: str) -> None:
    plain = nn.MultiheadAttention(8, 2, **KINDS[kind]).eval()
    before = copy.deepcopy(plain)
    model = filled(plain)
    assert len(lorary.Adapter.of(model).sites) == (4 if kind == "other widths" else 2)
    inputs, options = list(calls(before))[1]
    live = model(*inputs, **options)[0]
    assert (live - before(*inputs, **options)[0]).abs().max() > 1e-2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(*inputs, **options)[0], live)
        fill(model)
    with lorary.disabled(model):
        torch.testing.assert_close(model(*inputs, **options)[0], before(*inputs, **options)[0], atol=1e-6, rtol=0)
    lorary.merge(model, keep=True)
    assert type(plain.out_proj) is type(before.out_proj)
    assert "forward" not in vars(plain)
    torch.testing.assert_close(model(*inputs, **options)[0], live, atol=2e-6, rtol=0)
    lorary.unmerge(model)
    assert torch.equal(model(*inputs, **options)[0], live)
    lorary.detach(model)
    assert vars(plain).keys() == vars(before).keys()
    assert plain._qkv_same_embed_dim == before._qkv_same_embed_dim
    assert list(plain.state_dict()) == list(before.state_dict())
    assert all(torch.equal(t, u) for t, u in zip(plain.parameters(), before.parameters(), strict=True))


def test_every_adapter_learns_and_no_bias_moves() -> None:
    model = filled(nn.MultiheadAttention(8, 2, kdim=6))
    query, key, value = torch.randn(5, 3, 8), torch.randn(4, 3, 6), torch.randn(4, 3, 8)
    model(query, key, value)[0].sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".params." in name and p.grad is not None and p.grad.any() for name, p in trained.items())


@pytest.mark.parametrize("name", ["dora", "pissa", "olora", "melora", "multilora", "vera", "lora-fa"])
def test_other_methods(name: str) -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0)
    x = torch.randn(5, 3, 8)
    before = model(x, x)
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=2), targets="all-linear"))
    torch.testing.assert_close(model(x, x), before, atol=1e-5, rtol=0)
    fill(model)
    live = model(x, x)
    assert not torch.allclose(live, before, atol=1e-2)
    lorary.merge(model)
    torch.testing.assert_close(model(x, x), live, atol=1e-5, rtol=0)


def test_one_projection_of_it() -> None:
    attention = nn.MultiheadAttention(8, 2)
    plan = lorary.plan(attention, LORA, targets=["in_proj_weight[q,v]"])
    assert plan.sites[0].trainable == 2 * 2 * (8 + 8)
    before = attention.in_proj_weight.detach().clone()
    lorary.attach(attention, plan)
    fill(attention)
    lorary.merge(attention)
    changed = (attention.in_proj_weight - before).abs().amax(1) > 0
    assert changed.tolist() == [True] * 8 + [False] * 8 + [True] * 8
    assert [p.name for p in lorary.plan(attention, LORA, targets="attention-qv").sites[0].site.parts] == ["q", "v"]


def test_an_attention_named_as_peft_names_it() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16)
    plan = lorary.plan(model, LORA, targets=["multihead_attn"])
    assert [p.site.name for p in plan.sites] == ["multihead_attn.in_proj_weight", "multihead_attn.out_proj"]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", "out_proj", ["layers.1.self_attn"]])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_fused_path_passes_an_adapter_by(nested: bool, grad: bool, targets: Any) -> None:
    """In evaluation nn.TransformerEncoder reads the weights of its layers, and passes tensors without their padding."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    before = copy.deepcopy(plain)
    model = filled(plain, targets)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for options in ({}, {"src_key_padding_mask": padding}):
        with torch.set_grad_enabled(grad):
            live = model(x, **options)[~padding]
            assert (live - before(x, **options)[~padding]).abs().max() > 1e-2
            merged = lorary.merge(copy.deepcopy(model))
            torch.testing.assert_close(merged(x, **options)[~padding], live, atol=1e-5, rtol=0)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0)
    before = copy.deepcopy(model)
    x = torch.randn(5, 3, 8)
    live = filled(model, ["in_proj_weight", "linear1"])(x, x)
    lorary.save(model, tmp_path / "adapter")
    assert torch.equal(lorary.load(before, tmp_path / "adapter")(x, x), live)


def test_compiled_whole() -> None:
    model = filled(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x, need_weights=False)[0], model(x, x, x, need_weights=False)[0])


def test_its_biases_train_in_full_beside_it() -> None:
    model = nn.MultiheadAttention(8, 2)
    lorary.attach(model, lorary.plan(model, LORA.replace(full=("in_proj_bias", "out_proj.bias"))))
    x = torch.randn(5, 3, 8)
    model(x, x, x)[0].sum().backward()
    assert model.in_proj_bias.grad is not None
    assert set(lorary.Adapter.of(model).full) == {"in_proj_bias", "out_proj.bias"}


class Held(nn.Module):
    """A block that runs its layers from a plain list, as Mask2Former's and OneFormer's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.ReLU()]
        for i, layer in enumerate(self.layers):
            self.add_module(str(i), layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_in_a_plain_list_is_replaced_there_too() -> None:
    model = Held()
    before = copy.deepcopy(model)
    x = torch.randn(3, 4)
    live = filled(model)(x)
    assert not torch.allclose(live, before(x))
    torch.testing.assert_close(lorary.merge(copy.deepcopy(model))(x), live)
    lorary.detach(model)
    assert torch.equal(model(x), before(x))
    assert model.layers[0] is model.get_submodule("0")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, method: lorary.Method, targets: Any) -> str:
    with pytest.raises(LoraryError) as refused:
        lorary.attach(model, lorary.plan(model, method, targets=targets))
    assert not any(isinstance(m, lorary.Adapted) for m in model.modules())
    return str(refused.value)


@pytest.mark.parametrize(
    ("method", "targets", "sentence"),
    [
        ("glora", "in_proj_weight", "GLoRADelta changes the bias of a layer, and that of an in-projection belongs to"),
        ("ia3", "in_proj_weight", "Rescaling changes the bias of a layer, and that of an in-projection belongs to"),
        ("eva", "out_proj", "no calibration pass measures a projection of nn.MultiheadAttention (InputDirectionsInit)"),
        ("corda", "in_proj_weight", "no calibration pass measures a projection of nn.MultiheadAttention"),
        ("lora", "in_proj_weight[gate]", "has no projection gate"),
        ("lora", "q_proj_weight", "`q_proj_weight` matches no layer"),
    ],
)
def test_what_a_projection_cannot_have(method: str, targets: str, sentence: str) -> None:
    options = {} if method in ("glora", "ia3") else {"r": 2}
    assert sentence in refusal(nn.TransformerDecoderLayer(8, 2, 16), lorary.method(method, **options), targets)


def test_a_preset_leaves_out_what_the_method_cannot_have() -> None:
    plan = lorary.plan(nn.TransformerDecoderLayer(8, 2, 16), lorary.method("ia3"), targets="all-linear")
    assert not any("in_proj" in p.site.name for p in plan.sites)
    assert any("in_proj_weight: Rescaling changes the bias" in note for note in plan.notes)


def test_masks_of_a_wrong_shape() -> None:
    model = filled(nn.MultiheadAttention(8, 2))
    x = torch.randn(5, 3, 8)
    with pytest.raises(RuntimeError, match=r"attn_mask has the shape \[1, 5\], expected \[5, 5\] or \[6, 5, 5\]"):
        model(x, x, x, attn_mask=torch.zeros(1, 5))
    with pytest.raises(RuntimeError, match=r"key_padding_mask has the shape \[5\], expected \[3, 5\]"):
        model(x, x, x, key_padding_mask=torch.zeros(5))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(x, x, x, is_causal=True)


def test_an_attention_of_another_shape_takes_no_adapter_of_this_one(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    lorary.save(filled(nn.MultiheadAttention(8, 2)), adapter)
    with pytest.raises(LoraryError, match="has 12 input features, expected 8"):
        lorary.load(nn.MultiheadAttention(12, 2), adapter)
    with pytest.raises(LoraryError, match="in_proj_weight: the model has no such module"):
        lorary.load(nn.MultiheadAttention(8, 2, kdim=6), adapter)


def test_a_projection_is_not_quantised() -> None:
    model = nn.TransformerDecoderLayer(64, 2, 64)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2), targets="all-linear"))
    assert type(model.self_attn.out_proj.base) is nn.modules.linear.NonDynamicallyQuantizableLinear
    x = torch.randn(5, 3, 64)
    model(x, x).sum().backward()


def test_a_forward_of_its_own_is_left_alone() -> None:
    model = nn.MultiheadAttention(8, 2)
    model.forward = lambda x: x  # type: ignore[assignment,method-assign]
    assert "in_proj_weight" not in scan(model).modules
    with pytest.raises((PlanError, MethodError)):
        lorary.plan(model, tiny.LORA, targets="in_proj_weight")
