"""VeRA: two vectors around one pair of random matrices, which all layers share and nobody trains."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import adapted_layers
from lorary.spec.site import Part

from .. import tiny
from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature


def vera(p: Any) -> Tensor:
    """diag(b) B diag(d) A."""
    return torch.diag(p["b"]) @ p["B"] @ torch.diag(p["d"]) @ p["A"]


def bank(model: nn.Module) -> Any:
    """The one module that holds A and B."""
    (only,) = {id(layer.shared): layer.shared for layer in adapted_layers(model).values()}.values()
    return only


def llama(**options: Any) -> nn.Module:
    model = tiny.seeded("LlamaForCausalLM")
    return lorary.attach(model, lorary.plan(model, lorary.method("vera", r=6, **options), ["all-linear", "embedding"]))


# --- the start --------------------------------------------------------------------------------------------------------


@EACH_EVEN
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "vera"), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@pytest.mark.parametrize("d", [0.1, 2.0])
def test_the_vectors_start_where_they_are_told(d: float) -> None:
    layer = attached(nn.Linear(5, 4), "vera", r=7, d=d)
    assert torch.equal(layer.params["d"], torch.full((7,), d, dtype=torch.float64))
    assert torch.equal(layer.params["b"], torch.zeros(4).double())
    assert set(layer.params) == {"b", "d"}


def test_the_projections_are_uniform_within_the_root_of_six_over_the_fan() -> None:
    """Kaiming's bound for a gain of the square root of 2, unlike LoRA's start: 0.61 for 16 inputs."""
    model = nn.Sequential(nn.Linear(16, 200))
    lorary.attach(model, lorary.plan(model, lorary.method("vera", r=300), "0"))
    A, B = (adapted_layers(model)["0"].tensors[role] for role in "AB")
    for tensor, bound in ((A, math.sqrt(6 / 16)), (B, math.sqrt(6 / 300))):
        assert 0.97 * bound < tensor.abs().max() <= bound
        assert tensor.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert abs(tensor.mean().item()) < 0.03 * bound


@EACH_EVEN
def test_b_alone_has_a_gradient_at_first(make: Any, x: Any) -> None:
    assert signature(attached(make(), "vera"), x()) == {"b": "some", "d": "zero"}


def test_there_is_no_alpha() -> None:
    assert attached(nn.Linear(5, 4), "vera", r=7).scale == 1.0
    with pytest.raises(lorary.errors.MethodError, match="alpha"):
        lorary.method("vera", alpha=4.0)


# --- the function -----------------------------------------------------------------------------------------------------


@EACH_EVEN
def test_the_update_is_two_diagonals_around_two_matrices(make: Any, x: Any) -> None:
    layer = shake(attached(make(), "vera"))
    W = matrix(layer) + vera(layer.tensors).detach()
    same_function(layer, x(), W)
    exactly(layer.merged()[0], W)


@EACH_EVEN
def test_gradients(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "vera")), x()
    found = gradients(layer, inputs)
    exactly(found, dense_gradients(layer, inputs, lambda p: matrix(layer) + vera(p)))
    assert set(found) == {"b", "d"}


def test_gradients_in_closed_form() -> None:
    """db = rowsum(G (B diag(d) A)) and dd = diag(B^T diag(b) G A^T), with G = Gy^T X."""
    layer, x = shake(attached(nn.Linear(5, 4), "vera")), torch.randn(6, 5).double()
    y = layer(x)
    Gy = torch.randn_like(y)
    y.backward(Gy)
    A, B = (layer.tensors[role] for role in "AB")
    b, d, G = layer.params["b"].detach(), layer.params["d"].detach(), Gy.T @ x
    exactly(layer.params["b"].grad, (G * (B @ torch.diag(d) @ A)).sum(1))
    exactly(layer.params["d"].grad, (B.T @ torch.diag(b) @ G @ A.T).diagonal())


def test_the_parts_of_a_fused_weight_have_vectors_of_their_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(6, 18).double()

    model = Attention()
    lorary.attach(model, lorary.plan(model, lorary.method("vera", r=3), "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["c_attn"])
    assert [type(part) for part in layer.site.parts] == [Part, Part]
    p = layer.tensors
    assert {role: tuple(t.shape) for role, t in p.items()} == {"A": (3, 6), "B": (6, 3), "b": (12,), "d": (6,)}
    update = layer.merged()[0] - matrix(layer)
    q = {"A": p["A"], "B": p["B"], "b": p["b"][:6], "d": p["d"][:3]}
    v = {"A": p["A"], "B": p["B"], "b": p["b"][6:], "d": p["d"][3:]}
    exactly(update[:6], vera(q).detach())
    exactly(update[12:], vera(v).detach())
    assert not update[6:12].any()
    x = torch.randn(4, 6).double()
    same_function(layer, x, layer.merged()[0])
    found = gradients(layer, x)

    def formula(t: dict[str, Tensor]) -> Tensor:
        B, A = layer.method.delta.factors(layer.site, t)  # type: ignore[union-attr]
        return matrix(layer) + B @ A

    exactly(found, dense_gradients(layer, x, formula))


def test_on_the_unmodified_base_it_is_lora_of_the_same_rank() -> None:
    model = llama()
    tiny.shaken(model)
    forms = Adapter.of(model).low_rank()
    for name, layer in adapted_layers(model).items():
        form = forms[name]
        assert form.A.shape[0] == 6
        assert form.gain is None
        torch.testing.assert_close(form.B @ form.A, vera(layer.tensors).detach())


def test_with_dora_the_norm_is_that_of_the_sum() -> None:
    layer, x = shake(attached(nn.Linear(6, 4), "vera", "dora"), 0.3), torch.randn(5, 6).double()
    V = (matrix(layer) + vera(layer.tensors)).detach()
    same_function(layer, x, layer.params["m"].detach()[:, None] * V / V.norm(dim=1, keepdim=True))


# --- one bank ---------------------------------------------------------------------------------------------------------


def one(model: nn.Module) -> None:
    """All layers look at the leading corner of the same two tensors."""
    whole = bank(model).tensors
    assert {role: tuple(t.shape) for role, t in whole.items()} == {"A": (6, 40), "B": (24, 6)}
    for layer in adapted_layers(model).values():
        for role, tensor in layer.tensors.items():
            if role in whole:
                assert tensor.data_ptr() == whole[role].data_ptr()
                assert torch.equal(tensor, whole[role][tuple(slice(n) for n in tensor.shape)])
                assert not tensor.requires_grad


def test_one_tensor_for_all_layers() -> None:
    one(llama())


def test_it_stays_one_when_the_model_is_copied_moved_or_cast() -> None:
    model = llama()
    twin = copy.deepcopy(model)
    one(twin)
    assert bank(twin) is not bank(model)
    assert bank(twin).tensors["A"].data_ptr() != bank(model).tensors["A"].data_ptr()
    for dtype in (torch.bfloat16, torch.float64):
        twin.to(dtype)
        one(twin)
        assert bank(twin).tensors["A"].dtype == dtype
    assert bank(model).tensors["A"].dtype == torch.float32


def test_it_stays_one_when_saved_loaded_and_switched(tmp_path: Any) -> None:
    model = llama()
    expected = tiny.logits(tiny.shaken(model))
    lorary.save(model, tmp_path / "out")
    fresh = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "out")
    one(fresh)
    assert torch.equal(tiny.logits(fresh), expected)
    value = Adapter.of(model)
    addresses = {role: {t[role].data_ptr() for t in value.tensors.values()} for role in "AB"}
    assert {role: len(each) for role, each in addresses.items()} == {"A": 1, "B": 1}
    lorary.switch(fresh, None)
    lorary.switch(fresh, value)
    one(fresh)
    assert torch.equal(tiny.logits(fresh), expected)


def test_nobody_trains_it() -> None:
    model = llama()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"b", "d"}
    addresses = {p.data_ptr() for p in model.parameters()}
    before = {role: t.clone() for role, t in bank(model).tensors.items()}
    assert not addresses & {t.data_ptr() for t in bank(model).tensors.values()}
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.1, weight_decay=0.5))
    for _ in range(3):
        model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[role], t) for role, t in bank(model).tensors.items())
    decayed = [p for row in optimizer.param_groups for p in row["params"]]
    assert not {p.data_ptr() for p in decayed} & {t.data_ptr() for t in bank(model).tensors.values()}


def test_the_seed_makes_it_again_bit_for_bit() -> None:
    first, again, other = bank(llama(seed=3)), bank(llama(seed=3)), bank(llama(seed=4))
    for role in "AB":
        assert torch.equal(first.tensors[role], again.tensors[role])
        assert not torch.equal(first.tensors[role], other.tensors[role])


def test_it_is_drawn_on_the_cpu_in_32_bits_whatever_the_precision() -> None:
    model = tiny.seeded("LlamaForCausalLM").to(torch.bfloat16)
    plan = lorary.plan(model, lorary.method("vera", r=6), ["all-linear", "embedding"])
    lorary.attach(model, plan, dtype=torch.bfloat16, seed=11)  # the seed of the attachment is another one
    torch.testing.assert_close(bank(model).tensors["A"], bank(llama()).tensors["A"].bfloat16(), rtol=0, atol=0)


def test_numbers_that_stay_the_same_from_version_to_version() -> None:
    """A file without A and B draws them again: these are the numbers that it must find."""
    A, B = (bank(llama(seed=0)).tensors[role] for role in "AB")
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(A, (torch.rand(6, 40, generator=generator) * 2 - 1) * math.sqrt(6 / 40))
    torch.testing.assert_close(B, (torch.rand(24, 6, generator=generator) * 2 - 1) * math.sqrt(6 / 6))


def test_ranks_of_their_own_look_at_fewer_rows() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("vera", r=6), ranks={"*.mlp.*": 2}))
    whole = bank(model).tensors["A"]
    small = adapted_layers(model)["model.layers.0.mlp.up_proj"].tensors["A"]
    assert small.shape == (2, 16)
    assert torch.equal(small, whole[:2, :16])
