"""LoRA: the step-0 gradient signature and the closed-form gradients, against autograd on the dense weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers

from .layers import EACH, LAYERS, attached, loss_of, shake, signature

# --- step 0 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("linear", (), {"A": "zero", "B": "some"}),
        ("conv2d", (), {"A": "zero", "B": "some"}),
        ("embedding", (), {"A": "some", "B": "zero"}),
        ("linear", ("lora-fa",), {"A": "none", "B": "some"}),
        ("conv2d", ("lora-fa",), {"A": "none", "B": "some"}),
        ("linear", ("rslora", "lora+"), {"A": "zero", "B": "some"}),
    ],
)
def test_the_first_gradients(kind: str, names: tuple[str, ...], expected: dict[str, str]) -> None:
    make, x = next(row[1:] for row in LAYERS if row[0] == kind)
    assert signature(attached(make(), *names), x()) == expected


def test_only_tokens_that_were_seen_get_a_gradient() -> None:
    layer = attached(nn.Embedding(9, 4))
    loss_of(layer(torch.tensor([[1, 5, 5], [0, 8, 1]]))).backward()
    seen = layer.params["A"].grad.abs().sum(0) > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 5, 8]


def test_the_padding_token_gets_none() -> None:
    layer = attached(nn.Embedding(9, 4, padding_idx=5))
    loss_of(layer(torch.tensor([[1, 5, 5], [0, 8, 1]]))).backward()
    seen = layer.params["A"].grad.abs().sum(0) > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 8]


@EACH
def test_at_the_start_the_layer_is_its_base(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer, inputs = attached(make()), x()
    assert torch.equal(layer(inputs), layer.base(inputs))


@EACH
def test_the_start_is_that_of_the_authors_code(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer = attached(make(), r=64)
    inp = layer.site.in_features
    if layer.site.kind == "embedding":
        assert not layer.params["A"].any()
        assert 0.8 < layer.params["B"].std() < 1.2  # N(0, 1)
        return
    assert not layer.params["B"].any()
    assert layer.params["A"].abs().max() <= inp**-0.5  # U(-1/sqrt(inp), 1/sqrt(inp)), variance 1 / (3 inp)
    assert layer.params["A"].var().item() == pytest.approx(1 / (3 * inp), rel=0.25)


# --- closed forms ----------------------------------------------------------------------------------------------------


@EACH
def test_gradients_of_the_factors(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    """dB = s G A^T and dA = s B^T G, where G is the gradient of the dense weight W + s B A."""
    layer, inputs = shake(attached(make())), x()
    loss_of(layer(inputs)).backward()
    B, A = layer.params["B"].detach(), layer.params["A"].detach()
    dense = (layer.kind.matrix(layer.base) + layer.scale * B @ A).detach().requires_grad_()
    loss_of(layer.kind.run(layer.base, inputs, dense, layer.bias)).backward()
    G = dense.grad
    torch.testing.assert_close(layer.params["B"].grad, layer.scale * G @ A.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.params["A"].grad, layer.scale * B.T @ G, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_linear_layer_from_inputs_and_output_gradients() -> None:
    """G = Gy^T X, so dB = s Gy^T (X A^T) and dA = s (Gy B)^T X."""
    layer, x = shake(attached(nn.Linear(5, 4))), torch.randn(6, 5).double()
    y = layer(x)
    Gy = torch.randn_like(y)
    y.backward(Gy)
    B, A, s = layer.params["B"].detach(), layer.params["A"].detach(), layer.scale
    torch.testing.assert_close(layer.params["B"].grad, s * Gy.T @ (x @ A.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.params["A"].grad, s * (Gy @ B).T @ x, rtol=1e-12, atol=1e-12)


@EACH
def test_the_frozen_weight_gets_no_gradient(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer = shake(attached(make()))
    loss_of(layer(x())).backward()
    assert all(p.grad is None and not p.requires_grad for p in layer.base.parameters())


@pytest.mark.parametrize(("make", "x"), [row[1:] for row in LAYERS[:2]], ids=["linear", "conv2d"])
def test_gradients_flow_through_to_the_input(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    layer, inputs = shake(attached(make())), x().requires_grad_()
    loss_of(layer(inputs)).backward()
    got, inputs.grad = inputs.grad, None
    W, b = layer.merged()
    loss_of(layer.kind.run(layer.base, inputs, W, b)).backward()
    torch.testing.assert_close(got, inputs.grad, rtol=1e-12, atol=1e-12)


@EACH
def test_twice_alpha_is_twice_the_update(make: Callable[[], nn.Module], x: Callable[[], Tensor]) -> None:
    one, two = (shake(attached(make(), alpha=alpha)) for alpha in (6.0, 12.0))
    two.base.load_state_dict(one.base.state_dict())
    two.load({role: p.detach() for role, p in one.params.items()})
    inputs = x()
    base = one.base(inputs)
    torch.testing.assert_close(two(inputs) - base, 2 * (one(inputs) - base))


def test_the_update_has_at_most_rank_r() -> None:
    layer = shake(attached(nn.Linear(12, 10), r=3))
    update = layer.merged()[0] - layer.weight
    assert torch.linalg.matrix_rank(update) == 3


def test_fused_projections_learn_a_pair_each() -> None:
    """The update of part i is s B_i A_i on its rows, and nothing touches the rows of the others."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = nn.Linear(5, 15).double()

    model = Attention()
    method = lorary.method(r=2, alpha=6.0)
    lorary.attach(model, lorary.plan(model, method, "c_attn[q,v]"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["c_attn"])
    B, A = layer.params["B"], layer.params["A"]
    assert A.shape == (4, 5)
    assert B.shape == (10, 2)
    update = layer.merged()[0] - layer.weight
    torch.testing.assert_close(update[:5], 3 * B[:5] @ A[:2])
    torch.testing.assert_close(update[10:], 3 * B[5:] @ A[2:])
    assert not update[5:10].any()


def test_dropout_acts_on_the_input_of_the_adapter_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(400, 4, bias=False))
    lorary.attach(model, lorary.plan(model, lorary.method(r=2, dropout=0.5), "0"))
    layer = shake(adapted_layers(model)["0"])
    x = torch.ones(1, 400)
    model.eval()
    exact = layer(x) - layer.base(x)
    assert torch.equal(layer(x), layer(x))
    model.train()
    draws = torch.stack([layer(x) - layer.base(x) for _ in range(400)])
    assert draws.std() > 0
    spread = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - exact).abs() < 5 * spread).all()  # inverted dropout: the same on average
    assert torch.equal(layer.base(x), F.linear(x, layer.weight))
