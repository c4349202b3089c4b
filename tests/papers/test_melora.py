"""MELoRA: n small LoRAs on slices that do not touch, the rank of all for the numbers of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers

from .layers import (
    EACH_EVEN,
    attached,
    blocks,
    dense_gradients,
    exactly,
    gradients,
    matrix,
    same_function,
    shake,
    signature,
)


@EACH_EVEN
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "melora", n=2), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@EACH_EVEN
def test_the_first_gradients(make: Any, x: Any) -> None:
    layer = attached(make(), "melora", n=2)
    table = layer.site.kind == "embedding"
    assert signature(layer, x()) == ({"A": "some", "B": "zero"} if table else {"A": "zero", "B": "some"})


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_starts_within_the_bound_of_its_slice(n: int) -> None:
    """U(-1 / sqrt(inp / n), 1 / sqrt(inp / n)): the fan of a row is its slice."""
    A = attached(nn.Linear(256, 64), "melora", r=32, n=n).params["A"]
    bound = math.sqrt(n / 256)
    assert A.shape == (32 * n, 256 // n)
    assert 0.97 * bound < A.abs().max() <= bound


@EACH_EVEN
@pytest.mark.parametrize("names", [("melora",), ("melora", "rslora")])
def test_it_is_the_block_diagonal_dense_form(make: Any, x: Any, names: tuple[str, ...]) -> None:
    layer = shake(attached(make(), *names, r=2, n=2))
    assert layer.scale == (6.0 / math.sqrt(2) if "rslora" in names else 3.0)  # of the small rank
    A, B = (layer.params[role].detach() for role in "AB")
    W = matrix(layer) + layer.scale * blocks(B, 2) @ blocks(A, 2)
    same_function(layer, x(), W)
    exactly(layer.merged()[0], W)


@EACH_EVEN
def test_gradients(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "melora", n=2)), x()
    formula = dense_gradients(
        layer, inputs, lambda p: matrix(layer) + layer.scale * blocks(p["B"], 2) @ blocks(p["A"], 2)
    )
    exactly(gradients(layer, inputs), formula)


def test_nothing_off_the_blocks() -> None:
    layer = shake(attached(nn.Linear(6, 9), "melora", r=2, n=3))
    update = layer.merged()[0] - matrix(layer)
    for i in range(3):
        for j in range(3):
            block = update[3 * i : 3 * i + 3, 2 * j : 2 * j + 2]
            assert bool(block.all()) if i == j else not block.any()


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_rank_is_n_r_for_the_numbers_of_r(n: int) -> None:
    layer = shake(attached(nn.Linear(48, 32), "melora", r=2, n=n))
    assert torch.linalg.matrix_rank(layer.merged()[0] - matrix(layer)) == 2 * n
    assert sum(p.numel() for p in layer.params.values()) == 2 * (48 + 32)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Embedding(10, 4)], ids=["linear", "embedding"])
def test_one_of_them_is_lora(make: Any) -> None:
    x = torch.tensor([[1, 5], [9, 0]]) if isinstance(make(), nn.Embedding) else torch.randn(5, 6).double()
    torch.manual_seed(0)
    one = attached(make(), "melora", r=3, n=1)
    torch.manual_seed(0)
    lora = attached(make(), "lora", r=3)
    for role in "AB":
        assert torch.equal(one.params[role], lora.params[role])
    shake(one)
    lora.load({role: p.detach() for role, p in one.params.items()})
    exactly(one(x), lora(x))


@EACH_EVEN
def test_exported_it_is_lora_of_rank_n_r(make: Any, x: Any) -> None:
    model = nn.Sequential(make().double())
    lorary.attach(model, lorary.plan(model, lorary.method("melora", r=2, n=2, alpha=6.0), "0"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["0"])
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape[0] == 4
    # alpha' = n alpha: (n alpha) / (n r) is the small LoRAs' own scale
    torch.testing.assert_close(form.B.double(), 12.0 / 4 * blocks(layer.params["B"].detach(), 2), rtol=1e-6, atol=1e-6)
    inputs = x()
    W = matrix(layer) + form.B.double() @ form.A.double()
    torch.testing.assert_close(layer(inputs), layer.kind.run(layer.base, inputs, W, layer.bias), rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_fused_weight_are_each_cut_into_slices() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(6, 18).double()

    model = Attention()
    method = lorary.method("melora", r=1, n=2, alpha=3.0)
    lorary.attach(model, lorary.plan(model, method, "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["c_attn"])
    A, B = layer.params["A"].detach(), layer.params["B"].detach()
    assert (A.shape, B.shape) == ((4, 3), (12, 1))
    update = layer.merged()[0] - layer.weight
    exactly(update[:6].detach(), 3 * blocks(B[:6], 2) @ blocks(A[:2], 2))
    exactly(update[12:].detach(), 3 * blocks(B[6:], 2) @ blocks(A[2:], 2))
    assert not update[6:12].any()
    same_function(layer, torch.randn(4, 6).double(), layer.merged()[0])


def test_inputs_of_any_number_of_dimensions() -> None:
    layer, x = shake(attached(nn.Linear(6, 4), "melora", n=2)), torch.randn(2, 3, 5, 6).double()
    flat = layer(x.reshape(-1, 6))
    exactly(layer(x).reshape(-1, 4), flat)
    exactly(layer(x[0, 0, 0]), flat[0])


def test_one_mask_for_all_slices_and_the_same_on_average() -> None:
    layer = shake(attached(nn.Linear(40, 4), "melora", n=2, dropout=0.5), 0.3)
    x = torch.randn(1, 40).double()
    exact = layer.eval()(x)
    layer.train()
    with torch.no_grad():
        draws = torch.cat([layer(x) for _ in range(600)])
    assert ((draws.mean(0) - exact[0]).abs() < 5 * draws.std(0) / 600**0.5).all()


def test_sizes_that_n_does_not_divide_are_refused() -> None:
    """The authors' code drops the remainder."""
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, lorary.method("melora", r=2, n=3))
    assert [problem.what for problem in refusal.value.problems] == [
        "n = 3 does not divide its 7 input features",
        "n = 3 does not divide its 5 output features",
    ]
