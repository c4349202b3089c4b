"""rsLoRA: s = alpha / sqrt(r), and what that does to the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorary
from lorary.layers.adapted import adapted_layers

RANKS = [4, 16, 64, 256, 1024]


@pytest.mark.parametrize("r", RANKS)
def test_the_scale(r: int) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    placed = lorary.plan(model, lorary.method("rslora", r=r, alpha=3.0), "0").sites[0]
    assert placed.scale == 3.0 / r**0.5
    assert lorary.plan(model, lorary.method("lora", r=r, alpha=3.0), "0").sites[0].scale == 3.0 / r


def first_step(*names: str, r: int) -> float:
    """How far one SGD step moves the output of a 64-wide layer, for one input, on average over 20 starts."""
    moves = []
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(64, 4, bias=False)), torch.randn(1, 64)
        before = model(x)
        lorary.attach(model, lorary.plan(model, lorary.method(*names, r=r, alpha=1.0), "0"), seed=seed)
        model(x).sum().backward()
        B = adapted_layers(model)["0"].params["B"]
        with torch.no_grad():
            B -= 0.01 * B.grad
        moves.append((model(x) - before).abs().mean().item())
    return sum(moves) / len(moves)


def test_the_first_step_is_flat_in_the_rank() -> None:
    steps = [first_step("rslora", r=r) for r in RANKS]
    assert max(steps) / min(steps) < 2


def test_that_of_lora_falls_with_the_rank() -> None:
    steps = [first_step("lora", r=r) for r in RANKS]
    for small, large in zip(steps[1:], steps, strict=False):
        assert 2 < large / small < 8  # 1 / r: four times less at four times the rank
    assert steps[0] / steps[-1] > 64


@pytest.mark.parametrize("names", [("lora",), ("rslora",)])
@pytest.mark.parametrize("r", [4, 64])
def test_the_first_step_in_closed_form(names: tuple[str, ...], r: int) -> None:
    """One SGD step of rate eta moves the output by -eta s^2 |A x|^2 Gy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False)).double()
    x = torch.randn(1, 64).double()
    before = model(x)
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=r, alpha=2.0), "0"), dtype=torch.float64)
    Gy = torch.randn(1, 8).double()
    model(x).backward(Gy)
    layer = adapted_layers(model)["0"]
    with torch.no_grad():
        layer.params["B"] -= 0.01 * layer.params["B"].grad
    expected = -0.01 * layer.scale**2 * (x @ layer.params["A"].T).square().sum() * Gy
    torch.testing.assert_close(model(x) - before, expected, rtol=1e-9, atol=1e-12)


def test_it_is_lora_with_another_alpha_bit_for_bit() -> None:
    r, alpha = 16, 8.0
    x = torch.randn(3, 24)
    answers = []
    for method in (
        lorary.method("rslora", r=r, alpha=alpha),
        lorary.method("lora", r=r, alpha=alpha * r**0.5),
    ):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 12))
        lorary.attach(model, lorary.plan(model, method))
        optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.01))
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        answers.append(model(x))
    assert torch.equal(*answers)
