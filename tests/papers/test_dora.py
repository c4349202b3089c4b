"""DoRA: a magnitude per output, the norm of a row, what counts as a constant, and what is never scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers

from .layers import (
    EACH_EVEN,
    attached,
    dense_gradient,
    dense_gradients,
    exactly,
    gradients,
    loss_of,
    matrix,
    same_function,
    shake,
    signature,
)

EXACT = pytest.mark.parametrize("exact", [False, True], ids=["detached", "exact"])


def direction(layer: Any) -> Tensor:
    """V = W + s B A."""
    B, A = layer.factors()
    return (matrix(layer) + layer.scale * B @ A).detach()


# --- the start --------------------------------------------------------------------------------------------------------


@EACH_EVEN
@EXACT
@pytest.mark.parametrize("names", [("dora",), ("dora", "rslora"), ("dora", "melora"), ("dora", "multilora")])
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any, exact: bool, names: tuple[str, ...]) -> None:
    layer, inputs = attached(make(), *names, r=2, exact=exact), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@EACH_EVEN
def test_the_magnitudes_start_at_the_norms_of_the_outputs(make: Any, x: Any) -> None:
    """Over everything but the outputs: a filter for a convolution, a coordinate over the vocabulary of a table."""
    layer = attached(make(), "dora")
    weight = layer.weight
    over = {"transposed": 0, "embedding": 0}.get(layer.site.kind)
    expected = weight.norm(dim=over) if over is not None else weight.flatten(1).norm(dim=1)
    exactly(layer.params["m"].detach(), expected)


def test_the_first_gradients() -> None:
    layer = attached(nn.Linear(5, 4), "dora")
    assert signature(layer, torch.randn(6, 5).double()) == {"A": "zero", "B": "some", "m": "some"}
    table = attached(nn.Embedding(9, 4), "dora")
    assert signature(table, torch.tensor([1, 5, 8])) == {"A": "some", "B": "zero", "m": "some"}


@EACH_EVEN
def test_the_first_gradient_of_b_is_that_of_lora_and_that_of_m_has_a_closed_form(make: Any, x: Any) -> None:
    inputs = x()
    layer = attached(make(), "dora")
    lora = attached(make(), "lora")
    lora.base.load_state_dict(layer.base.state_dict())
    lora.load({role: layer.params[role].detach() for role in "AB"})
    ours, plain = gradients(layer, inputs), gradients(lora, inputs)
    exactly(ours["A"], plain["A"])
    exactly(ours["B"], plain["B"])
    W = matrix(layer)
    G = dense_gradient(layer, inputs, W)
    exactly(ours["m"], (G * W).sum(1) / W.norm(dim=1))  # dm_i = G_i . W_i / |W_i|


def test_the_gradient_of_m_from_outputs() -> None:
    """dm_i = sum_t Gy[t, i] (V x_t)_i / c_i."""
    layer, x = shake(attached(nn.Linear(5, 4), "dora")), torch.randn(6, 5).double()
    y = layer(x)
    Gy = torch.randn_like(y)
    y.backward(Gy)
    V = direction(layer)
    exactly(layer.params["m"].grad, (Gy * (x @ V.T)).sum(0) / V.norm(dim=1))


# --- gradients after training -----------------------------------------------------------------------------------------


@EACH_EVEN
@pytest.mark.parametrize("names", [("dora",), ("dora", "pissa"), ("vera", "dora"), ("dora", "melora")])
def test_the_norm_counts_as_a_constant(make: Any, x: Any, names: tuple[str, ...]) -> None:
    """dV = diag(m / c) G: what autograd gives where c is a number."""
    layer, inputs = shake(attached(make(), *names, r=2), 0.3), x()
    c = direction(layer).norm(dim=1)

    def formula(p: dict[str, Tensor]) -> Tensor:
        B, A = layer.method.delta.factors(layer.site, p)  # type: ignore[union-attr]
        return (p["m"] / c)[:, None] * (matrix(layer) + layer.scale * B @ A)

    exactly(gradients(layer, inputs), dense_gradients(layer, inputs, formula))


@EACH_EVEN
@pytest.mark.parametrize("names", [("dora",), ("dora", "pissa"), ("vera", "dora"), ("dora", "melora")])
def test_exactly_it_does_not(make: Any, x: Any, names: tuple[str, ...]) -> None:
    layer, inputs = shake(attached(make(), *names, r=2, exact=True), 0.3), x()

    def formula(p: dict[str, Tensor]) -> Tensor:
        B, A = layer.method.delta.factors(layer.site, p)  # type: ignore[union-attr]
        V = matrix(layer) + layer.scale * B @ A
        return (p["m"] / V.norm(dim=1))[:, None] * V

    exactly(gradients(layer, inputs), dense_gradients(layer, inputs, formula))


@EXACT
def test_the_gradient_of_the_direction_in_closed_form(exact: bool) -> None:
    """Detached: dB = s diag(m / c) G A^T. Exact: row i of G loses its part along v_i = V_i / c_i before."""
    layer, x = shake(attached(nn.Linear(5, 4), "dora", exact=exact)), torch.randn(6, 5).double()
    found = gradients(layer, x)
    V = direction(layer)
    c, m = V.norm(dim=1, keepdim=True), layer.params["m"].detach()[:, None]
    G = dense_gradient(layer, x, m / c * V)
    if exact:
        v = V / c
        G = G - (G * v).sum(1, keepdim=True) * v
    dV = m / c * G
    B, A = layer.params["B"].detach(), layer.params["A"].detach()
    exactly(found["B"], layer.scale * dV @ A.T)
    exactly(found["A"], layer.scale * B.T @ dV)


def test_the_exact_gradient_has_no_part_along_the_direction() -> None:
    layer, x = shake(attached(nn.Linear(5, 4), "dora", exact=True, r=5)), torch.randn(6, 5).double()
    with torch.no_grad():
        layer.params["A"].copy_(torch.eye(5))  # dB = s dV then
    dB = gradients(layer, x)["B"]
    assert dB is not None
    exactly((dB * direction(layer)).sum(1), torch.zeros(4).double())


# --- the function -----------------------------------------------------------------------------------------------------


@EACH_EVEN
@EXACT
def test_the_rows_of_the_merged_weight_have_the_magnitudes_as_norms(make: Any, x: Any, exact: bool) -> None:
    layer = shake(attached(make(), "dora", exact=exact), 0.5)
    W, b = layer.merged()
    exactly(W.norm(dim=1), layer.params["m"].detach().abs())
    V = direction(layer)
    exactly(W, layer.params["m"].detach()[:, None] * V / V.norm(dim=1, keepdim=True))
    same_function(layer, x(), W)
    if b is not None:
        assert torch.equal(b, layer.bias)


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_the_size_of_the_direction_does_not_matter(factor: float) -> None:
    layer, x = shake(attached(nn.Linear(5, 4), "dora")), torch.randn(6, 5).double()
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.params["B"].mul_(factor)
    exactly(layer(x), before)


@EACH_EVEN
def test_the_bias_is_never_scaled(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "dora"), x()
    with torch.no_grad():
        layer.params["m"].zero_()
    expected = torch.zeros_like(layer.base(inputs))
    if layer.bias is not None:
        expected = expected + layer.kind.broadcast_over_rows(layer.bias)
    exactly(layer(inputs), expected)


def test_twice_the_magnitude_is_twice_the_output() -> None:
    layer, x = shake(attached(nn.Linear(5, 4, bias=False), "dora")), torch.randn(6, 5).double()
    before = layer(x)
    with torch.no_grad():
        layer.params["m"][2] *= 2
    exactly(layer(x), before * torch.tensor([1, 1, 2, 1]))


def test_the_magnitudes_are_taken_after_the_start() -> None:
    """Of W - s B0 A0 + s B A, which is W itself, and not of what the base has kept."""
    layer = attached(nn.Linear(6, 4), "dora", "pissa", r=2)
    whole = matrix(layer) + layer.scale * layer.params["B"] @ layer.params["A"]
    exactly(layer.params["m"].detach(), whole.norm(dim=1).detach())
    assert not torch.allclose(layer.params["m"], matrix(layer).norm(dim=1), rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_magnitudes_of_a_16_bit_weight_are_in_32_bits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(300, 40).to(dtype))
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2), "0"))
    m = adapted_layers(model)["0"].params["m"]
    assert m.dtype == torch.float32
    torch.testing.assert_close(m.detach().double(), model[0].weight.double().norm(dim=1), rtol=1e-6, atol=0)
    assert not torch.equal(m, m.to(dtype).float())


# --- dropout ----------------------------------------------------------------------------------------------------------


@EXACT
@pytest.mark.parametrize("bias", [False, True])
def test_what_dropout_drops(exact: bool, bias: bool) -> None:
    """y = W x + (g - 1) W x~ + g s B A x~ + b, with one mask for both."""
    layer = shake(attached(nn.Linear(50, 4, bias=bias), "dora", dropout=0.5, exact=exact), 0.3)
    layer.train()
    x = torch.randn(6, 50).double()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    V = direction(layer)
    g = layer.params["m"].detach() / V.norm(dim=1)
    W = matrix(layer)
    expected = x @ W.T + (g - 1) * (dropped @ W.T) + g * (dropped @ (V - W).T)
    exactly(y, expected + (layer.bias if bias else 0.0))  # type: ignore[operator]


def test_on_average_dropout_changes_nothing() -> None:
    layer = shake(attached(nn.Linear(40, 4), "dora", dropout=0.5), 0.3)
    x = torch.randn(1, 40).double()
    exact = layer.eval()(x)
    layer.train()
    with torch.no_grad():
        draws = torch.cat([layer(x) for _ in range(600)])
    assert draws.std() > 0
    assert ((draws.mean(0) - exact[0]).abs() < 5 * draws.std(0) / 600**0.5).all()


def test_at_the_start_dropout_moves_nothing_that_was_there_before() -> None:
    """With g = 1 and B = 0 the frozen part keeps all of its inputs."""
    layer = attached(nn.Linear(40, 4), "dora", dropout=0.5)
    layer.train()
    x = torch.randn(3, 40).double()
    exactly(layer(x), layer.base(x))


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_under_dropout(bias: bool) -> None:
    layer = shake(attached(nn.Linear(12, 4, bias=bias), "dora", dropout=0.5), 0.3)
    layer.train()
    x = torch.randn(6, 12).double().requires_grad_()
    torch.manual_seed(3)
    loss_of(layer(x)).backward()
    found, fx = {role: p.grad for role, p in layer.params.items()}, x.grad
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5)
    given = {role: p.detach().clone().requires_grad_() for role, p in layer.params.items()}
    z = x.detach().clone().requires_grad_()
    W, g = matrix(layer), given["m"] / direction(layer).norm(dim=1)
    low = z * mask
    y = z @ W.T + (g - 1) * (low @ W.T) + g * (layer.scale * low @ given["A"].T @ given["B"].T)
    loss_of(y + (layer.bias.detach() if bias else 0.0)).backward()  # type: ignore[union-attr]
    exactly(found, {role: t.grad for role, t in given.items()})
    exactly(fx, z.grad)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("dora",), ("dora", "lora+"), ("vera", "dora"), ("dora", "lora-fa")])
def test_magnitudes_never_decay_and_learn_at_the_base_rate(names: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=2), "0"))
    m = adapted_layers(model)["0"].params["m"]
    rows = [row for row in lorary.param_groups(model, lr=0.5, weight_decay=0.1) if any(p is m for p in row["params"])]
    assert [(row["lr"], row["weight_decay"]) for row in rows] == [(0.5, 0.0)]
    assert all(p.ndim == 1 for p in rows[0]["params"])
