"""Single layers of every kind in double precision, with a method attached: what the papers' formulas are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.layers.adapted import Adapted, adapted_layers

Make = Callable[[], nn.Module]
Input = Callable[[], Tensor]

LAYERS: list[tuple[str, Make, Input]] = [
    ("linear", lambda: nn.Linear(5, 4), lambda: torch.randn(6, 5).double()),
    ("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), lambda: torch.randn(2, 4, 7, 7).double()),
    ("embedding", lambda: nn.Embedding(9, 4), lambda: torch.tensor([[1, 5, 5], [0, 8, 1]])),
]
# Sizes of which 2 divides every one, for methods that cut a layer into slices; and GPT-2's transposed layer.
EVEN: list[tuple[str, Make, Input]] = [
    ("linear", lambda: nn.Linear(6, 4), lambda: torch.randn(5, 6).double()),
    ("transposed", lambda: Conv1D(4, 6), lambda: torch.randn(5, 6).double()),
    ("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 7).double()),
    ("conv2d", lambda: nn.Conv2d(8, 6, (3, 2), stride=2, groups=2), lambda: torch.randn(2, 8, 7, 7).double()),
    ("conv3d", lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(2, 2, 4, 3, 3).double()),
    ("embedding", lambda: nn.Embedding(10, 4), lambda: torch.tensor([[1, 5, 5], [0, 9, 1]])),
]
EACH = pytest.mark.parametrize(("make", "x"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
EACH_EVEN = pytest.mark.parametrize(("make", "x"), [row[1:] for row in EVEN], ids=[row[0] for row in EVEN])


def attached(layer: nn.Module, *names: str, r: int = 3, **options: Any) -> Adapted:
    """One layer in double precision with a method attached at step 0; alpha is 6 where the scale has one."""
    model = nn.Sequential(layer.double())
    if not {"vera", "hira", "miss"} & set(names):
        options = {"alpha": 6.0} | options
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=r, **options), "0"), dtype=torch.float64)
    return adapted_layers(model)["0"]


def shake(layer: Adapted, size: float = 1.0) -> Adapted:
    """As after training: everything that may train is somewhere else."""
    with torch.no_grad():
        for p in layer.params.values():
            p.add_(torch.randn_like(p), alpha=size)
    return layer


def loss_of(y: Tensor) -> Tensor:
    """Some loss whose gradient is different for every output."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() + (y**2).sum() / 7


def signature(layer: Adapted, x: Tensor) -> dict[str, str]:
    """role -> "zero" or "some" gradient, or "none" at all, after the first backward pass."""
    loss_of(layer(x)).backward()
    grads = {role: p.grad for role, p in layer.params.items()}
    return {role: "none" if g is None else "some" if g.abs().max() > 0 else "zero" for role, g in grads.items()}


def matrix(layer: Adapted) -> Tensor:
    """The frozen weight as [out, inp]."""
    return layer.kind.matrix(layer.base).detach()


def dense_gradient(layer: Adapted, x: Tensor, W: Tensor) -> Tensor:
    """G: the gradient of the loss with respect to the dense weight, at W [out, inp]."""
    W = W.detach().clone().requires_grad_()
    loss_of(layer.kind.run(layer.base, x, W, layer.bias)).backward()
    assert W.grad is not None
    return W.grad


def dense_gradients(
    layer: Adapted, x: Tensor, formula: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor | None]:
    """role -> the gradient that autograd gives where the effective weight is `formula(role -> tensor)`, densely."""
    given = {role: t.detach().clone().requires_grad_() for role, t in layer.tensors.items()}
    loss_of(layer.kind.run(layer.base, x, formula(given), layer.bias)).backward()
    return {role: t.grad for role, t in given.items() if role in layer.params and layer.params[role].requires_grad}


def gradients(layer: Adapted, x: Tensor) -> dict[str, Tensor | None]:
    """role -> the gradient that the layer itself gives."""
    layer.zero_grad()
    loss_of(layer(x)).backward()
    return {role: p.grad for role, p in layer.params.items() if p.requires_grad}


def exactly(got: Any, expected: Any) -> None:
    """Equal in double precision up to rounding."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def same_function(layer: Adapted, x: Tensor, W: Tensor) -> None:
    """The layer's function is that of the plain layer with the weight W [out, inp] and its own bias."""
    exactly(layer(x), layer.kind.run(layer.base, x, W, layer.bias))


def blocks(t: Tensor, n: int) -> Tensor:
    """The block diagonal of n blocks that are stacked along the rows."""
    dense: Tensor = torch.block_diag(*t.chunk(n))
    return dense
