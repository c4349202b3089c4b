"""MultiLoRA: parallel LoRAs, each with a trained scale per output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import adapted_layers

from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature

N = 2


def parallel(p: Any, n: int = N) -> Tensor:
    """sum_i diag(gamma_i) B_i A_i."""
    A, B = p["A"].chunk(n), p["B"].chunk(n, 1)
    gamma = p["gamma"].view(-1, n)
    return sum((torch.diag(gamma[:, i]) @ B[i] @ A[i] for i in range(n)), torch.zeros(()).double())


@EACH_EVEN
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "multilora", n=N), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@EACH_EVEN
def test_gamma_alone_has_a_gradient_at_first(make: Any, x: Any) -> None:
    """Tables too: all of A and B start at random there as well."""
    layer = attached(make(), "multilora", n=N)
    assert signature(layer, x()) == {"A": "zero", "B": "zero", "gamma": "some"}


def test_both_factors_start_at_random_each_by_its_own_fan() -> None:
    p = attached(nn.Linear(256, 300), "multilora", r=16, n=3).params
    for role, bound in (("A", 1 / math.sqrt(256)), ("B", 1 / math.sqrt(16))):
        assert 0.97 * bound < p[role].abs().max() <= bound
        assert p[role].var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    assert not p["gamma"].any()


@EACH_EVEN
@pytest.mark.parametrize("names", [("multilora",), ("multilora", "rslora")])
def test_it_is_the_sum_of_scaled_loras(make: Any, x: Any, names: tuple[str, ...]) -> None:
    layer = shake(attached(make(), *names, n=N))
    assert layer.scale == (6.0 / math.sqrt(3) if "rslora" in names else 2.0)  # of one of them
    W = matrix(layer) + layer.scale * parallel(layer.params).detach()
    same_function(layer, x(), W)
    exactly(layer.merged()[0], W)


@EACH_EVEN
def test_gradients(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "multilora", n=N)), x()
    found = gradients(layer, inputs)
    assert set(found) == {"A", "B", "gamma"}
    exactly(found, dense_gradients(layer, inputs, lambda p: matrix(layer) + layer.scale * parallel(p)))


def test_the_gradient_of_gamma_in_closed_form() -> None:
    """dgamma_i = s rowsum(G (B_i A_i)) with G = Gy^T X."""
    layer, x = shake(attached(nn.Linear(5, 4), "multilora", n=N)), torch.randn(6, 5).double()
    y = layer(x)
    Gy = torch.randn_like(y)
    y.backward(Gy)
    A, B = layer.params["A"].detach().chunk(N), layer.params["B"].detach().chunk(N, 1)
    G = Gy.T @ x
    expected = torch.stack([layer.scale * (G * (B[i] @ A[i])).sum(1) for i in range(N)], 1)
    exactly(layer.params["gamma"].grad, expected.flatten())


@pytest.mark.parametrize("n", [1, 3])
def test_the_rank_is_n_r(n: int) -> None:
    layer = shake(attached(nn.Linear(48, 32), "multilora", r=2, n=n))
    assert torch.linalg.matrix_rank(layer.merged()[0] - matrix(layer)) == 2 * n


@EACH_EVEN
def test_exported_it_is_lora_of_rank_n_r(make: Any, x: Any) -> None:
    model = nn.Sequential(make().double())
    method = lorary.method("multilora", r=2, n=N, alpha=6.0)
    lorary.attach(model, lorary.plan(model, method, "0"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["0"])
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape[0] == 2 * N
    assert torch.equal(form.A, layer.params["A"].float())  # gamma and s are in B
    inputs = x()
    y = layer.kind.run(layer.base, inputs, matrix(layer) + form.B.double() @ form.A.double(), layer.bias)
    torch.testing.assert_close(layer(inputs), y, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_fused_weight_have_loras_of_their_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(6, 18).double()

    model = Attention()
    method = lorary.method("multilora", r=1, n=N, alpha=3.0)
    lorary.attach(model, lorary.plan(model, method, "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["c_attn"])
    p = {role: t.detach() for role, t in layer.params.items()}
    assert {role: tuple(t.shape) for role, t in p.items()} == {"A": (4, 6), "B": (12, 2), "gamma": (24,)}
    update = (layer.merged()[0] - layer.weight).detach()
    exactly(update[:6], 3 * parallel({"A": p["A"][:2], "B": p["B"][:6], "gamma": p["gamma"][:12]}))
    exactly(update[12:], 3 * parallel({"A": p["A"][2:], "B": p["B"][6:], "gamma": p["gamma"][12:]}))
    assert not update[6:12].any()
    same_function(layer, torch.randn(4, 6).double(), layer.merged()[0])


def test_it_learns() -> None:
    """Gamma and B both at zero would be a start from which nothing ever moves."""
    model = nn.Sequential(nn.Linear(6, 4))
    lorary.attach(model, lorary.plan(model, lorary.method("multilora", r=2, n=N), "0"))
    before = {role: p.detach().clone() for role, p in adapted_layers(model)["0"].params.items()}
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=0.1))
    x = torch.randn(5, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(before[role], p) for role, p in adapted_layers(model)["0"].params.items())
