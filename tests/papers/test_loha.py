"""LoHa: two low-rank products, multiplied element by element: the square of the rank for twice the numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter

from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature
from .test_counts import llama_2_7b

TUCKER = pytest.mark.parametrize("tucker", [False, True], ids=["matrices", "cores"])
CONVOLUTIONS = [nn.Conv1d(4, 6, 3), nn.Conv2d(8, 6, (3, 2), stride=2, groups=2), nn.Conv3d(2, 4, 2)]


def dense(p: dict[str, Tensor]) -> Tensor:
    """(B1 A1) * (B2 A2), with A_i = T_i x A_i over the channels: proposition 3, index by index."""
    products = []
    for i in "12":
        A = p[f"A{i}"]
        if f"T{i}" in p:
            core, (r, channels) = p[f"T{i}"], A.shape
            A = torch.stack([core[j].T @ A for j in range(r)])  # [r, window, channels]
            A = A.transpose(1, 2).reshape(r, -1)
            assert A.shape[1] == channels * core.shape[2]
        products.append(p[f"B{i}"] @ A)
    return products[0] * products[1]


@EACH_EVEN
@TUCKER
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any, tucker: bool) -> None:
    layer, inputs = attached(make(), "loha", tucker=tucker), x()
    assert torch.equal(layer(inputs), layer.base(inputs))
    found = signature(layer, inputs)
    assert {role for role, gradient in found.items() if gradient == "some"} == {"B2"}


@EACH_EVEN
@TUCKER
@pytest.mark.parametrize("r", [1, 2, 5])
def test_it_is_the_product_element_by_element(make: Any, x: Any, r: int, tucker: bool) -> None:
    """At every rank: through a middle of r^2, and as a whole matrix."""
    layer, inputs = shake(attached(make(), "loha", r=r, tucker=tucker)), x()
    p = {role: t.detach() for role, t in layer.params.items()}
    W = matrix(layer) + layer.scale * dense(p)
    same_function(layer, inputs, W)
    exactly(layer.merged()[0], W)
    B, A = layer.factors()
    exactly((B @ A).detach(), dense(p))
    assert A.shape[0] == min(r * r, *W.shape)
    formula = dense_gradients(layer, inputs, lambda p: matrix(layer) + layer.scale * dense(p))
    exactly(gradients(layer, inputs), formula)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_rank_is_the_square_for_twice_the_numbers(r: int) -> None:
    layer = shake(attached(nn.Linear(40, 30), "loha", r=r))
    assert torch.linalg.matrix_rank(layer.merged()[0] - matrix(layer)) == r * r
    assert sum(p.numel() for p in layer.params.values()) == 2 * r * (40 + 30)


def test_the_authors_defaults_and_start() -> None:
    """LyCORIS: network_dim 4, alpha 1; B1 (w1_a) of a tenth, B2 (w2_a) zero, A1 and A2 of one; cores of a tenth."""
    method = lorary.method("loha")
    assert (method.delta.r, method.scale(4)) == (4, 0.25)  # type: ignore[union-attr,misc]
    layer = attached(nn.Conv2d(64, 96, 3), "loha", r=48, tucker=True)
    stds = {"A1": 1.0, "A2": 1.0, "B1": 0.1, "B2": 0.0, "T1": 0.1, "T2": 0.1}
    assert {role: round(p.std().item(), 2) for role, p in layer.params.items()} == pytest.approx(stds, abs=0.02)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=lambda layer: type(layer).__name__)
def test_cores_spare_the_window(layer: Any) -> None:
    """2 (r^2 window + r (channels + out)) numbers instead of 2 r (channels window + out)."""
    window, channels = math.prod(layer.kernel_size), layer.in_channels // layer.groups
    for tucker, expected in (
        (True, 2 * (9 * window + 3 * (channels + layer.out_channels))),
        (False, 2 * 3 * (channels * window + layer.out_channels)),
    ):
        model = nn.Sequential(layer)
        assert lorary.plan(model, lorary.method("loha", r=3, tucker=tucker), "0").trainable == expected


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(4, 6, 1)])
def test_a_window_of_one_element_has_no_core(make: Any) -> None:
    assert set(attached(make(), "loha", tucker=True).params) == {"A1", "A2", "B1", "B2"}


def test_the_parts_of_a_fused_weight_have_one_product() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(6, 18).double()

    model = Attention()
    lorary.attach(model, lorary.plan(model, lorary.method("loha", r=2), "c_attn[q,v]"), dtype=torch.float64)
    layer: Any = shake(model.c_attn)  # type: ignore[arg-type]
    update = layer.merged()[0] - layer.weight
    product = layer.scale * dense({role: t.detach() for role, t in layer.params.items()})
    exactly(update[:6].detach(), product[:6])
    exactly(update[12:].detach(), product[6:])
    assert not update[6:12].any()


def test_twice_the_numbers_of_lora_on_llama_2_7b() -> None:
    plan = lorary.plan(llama_2_7b(), lorary.method("loha", r=4))
    assert plan.trainable == 2 * 39_976_960 // 4 == 19_988_480


def test_exported_it_is_lora_of_the_square_of_the_rank() -> None:
    model = nn.Sequential(nn.Linear(40, 30))
    lorary.attach(model, lorary.plan(model, lorary.method("loha", r=3), "0"))
    shake(model[0])  # type: ignore[arg-type]
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape == (9, 40)
    torch.testing.assert_close(form.B @ form.A, (model[0].merged()[0] - model[0].weight).detach())  # type: ignore


def test_one_mask_for_both_products() -> None:
    layer = shake(attached(nn.Linear(40, 4), "loha", r=5, dropout=0.5), 0.3)
    x = torch.randn(1, 40).double()
    exact = layer.eval()(x)
    layer.train()
    with torch.no_grad():
        draws = torch.cat([layer(x) for _ in range(600)])
    assert ((draws.mean(0) - exact[0]).abs() < 5 * draws.std(0) / 600**0.5).all()
