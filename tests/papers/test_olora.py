"""OLoRA: B starts orthonormal and A upper trapezoidal, from the first r columns alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import adapted_layers

from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature

DIVIDE = pytest.mark.parametrize("divide", [False, True], ids=["as published", "divided by s"])


def as_matrix(layer: nn.Module) -> Tensor:
    """The weight as [out, inp], by hand."""
    W = layer.weight.detach().clone()  # type: ignore[operator,union-attr]
    return W.T if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D" else W.flatten(1)


@EACH_EVEN
@DIVIDE
@pytest.mark.parametrize("alpha", [2.0, 64.0])
def test_at_the_start_nothing_moves(make: Any, x: Any, divide: bool, alpha: float) -> None:
    base = make().double()
    inputs = x()
    expected = base(inputs)
    layer = attached(base, "olora", r=2, alpha=alpha, divide=divide)
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-9, atol=1e-9)


@EACH_EVEN
@DIVIDE
def test_the_columns_of_b_are_orthonormal_and_a_is_upper_trapezoidal(make: Any, x: Any, divide: bool) -> None:
    base = make().double()
    W = as_matrix(base)
    layer = attached(base, "olora", r=3, alpha=6.0, divide=divide)
    B, A = (t.detach() for t in layer.factors())
    torch.testing.assert_close(B.T @ B, torch.eye(3).double(), rtol=0, atol=1e-6)  # decomposed in 32 bits
    below = A[:, :3].tril(-1)
    assert below.abs().max() < 1e-6
    assert A[:, :3].diagonal().abs().min() > 1e-3
    # Q_r R_r of the whole decomposition, of which only r columns were looked at
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close((layer.scale if divide else 1.0) * B @ A, Q[:, :3] @ R[:3], rtol=1e-5, atol=1e-6)


def test_columns_beyond_the_first_r_do_not_matter_to_b() -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 8)
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = nn.Linear(8, 6)
        with torch.no_grad():
            base.weight.copy_(torch.cat([W[:, :3], torch.randn(6, 5)], 1))
        starts.append(attached(base, "olora").params["B"].detach())
    assert torch.equal(*starts)


@EACH_EVEN
@DIVIDE
def test_the_base_gives_up_what_the_delta_starts_with(make: Any, x: Any, divide: bool) -> None:
    base = make().double()
    W = as_matrix(base)
    layer = attached(base, "olora", r=2, alpha=6.0, divide=divide)
    B, A = (t.detach() for t in layer.factors())
    exactly(matrix(layer), W - 3.0 * B @ A)
    s = 1.0 if divide else 3.0  # as published the base becomes (I - s Q Q^T) W
    torch.testing.assert_close(matrix(layer), W - s * B @ B.T @ W, rtol=1e-5, atol=1e-5)


@DIVIDE
def test_what_alpha_does_to_the_start(divide: bool) -> None:
    """Divided by s the base keeps (I - Q Q^T) W whatever alpha is; as published it grows with it."""
    rests = []
    for alpha in (3.0, 30.0):
        torch.manual_seed(0)
        rests.append(matrix(attached(nn.Linear(8, 6), "olora", alpha=alpha, divide=divide)))
    assert torch.allclose(*rests, rtol=1e-5, atol=1e-6) == divide


def test_it_captures_less_than_the_principal_directions_do() -> None:
    captured = {}
    for name in ("olora", "pissa"):
        torch.manual_seed(0)
        layer = attached(nn.Linear(64, 48), name, r=8, alpha=8.0)
        B, A = layer.factors()
        captured[name] = (B @ A).norm().item()
    assert captured["olora"] < 0.9 * captured["pissa"]


@EACH_EVEN
def test_both_factors_learn_from_the_first_step_on(make: Any, x: Any) -> None:
    assert signature(attached(make(), "olora", r=2), x()) == {"A": "some", "B": "some"}


@EACH_EVEN
def test_gradients(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "olora", r=2)), x()
    found = dense_gradients(layer, inputs, lambda p: matrix(layer) + layer.scale * p["B"] @ p["A"])
    exactly(gradients(layer, inputs), found)


@EACH_EVEN
@DIVIDE
def test_on_the_unmodified_base_it_is_lora_of_twice_the_rank(make: Any, x: Any, divide: bool) -> None:
    base = make().double()
    W = as_matrix(base)
    model = nn.Sequential(base)
    method = lorary.method("olora", r=2, alpha=6.0, divide=divide)
    lorary.attach(model, lorary.plan(model, method, "0"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["0"])
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape[0] == 4
    inputs = x()
    y = layer.kind.run(layer.base, inputs, W + form.B.double() @ form.A.double(), layer.bias)
    torch.testing.assert_close(layer(inputs), y, rtol=1e-5, atol=1e-5)


@EACH_EVEN
def test_merged(make: Any, x: Any) -> None:
    layer = shake(attached(make(), "olora", r=2))
    same_function(layer, x(), layer.merged()[0])


def test_a_square_transposed_weight_is_read_in_its_own_layout() -> None:
    """GPT-2 stores [in, out]: taken for [out, in] a square one would move the output."""
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(8, 8).double()
    nn.init.normal_(base.weight)
    x = torch.randn(5, 8).double()
    expected = base(x)
    layer = attached(base, "olora", r=2)
    exactly(layer(x), expected)
    assert layer.params["A"].shape == (2, 8)
    assert layer.params["A"][1, 0].abs() < 1e-6
