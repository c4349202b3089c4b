"""A second derivative through a fused node raises an error, by whichever function it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorary
from lorary.kernels import low_rank
from tests import tiny

METHODS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {}, "vera": {}, "melora": {"n": 2}, "glora": {}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wants", ["input", "parameters"])
def test_a_second_derivative_is_right_or_refused(name: str, wants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `torch.autograd.grad`, which passes by the error of PyTorch's own decorator."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh())
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=2, **METHODS[name]), "0"))
    tiny.shaken(model)
    x = torch.randn(3, 8, requires_grad=True)
    inputs = [x] if wants == "input" else [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)

    def penalty() -> Any:
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), inputs, allow_unused=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty()


def test_a_graph_of_the_first_derivative_alone_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    lorary.attach(model, lorary.plan(model, tiny.LORA, "0"))
    tiny.shaken(model)
    x = torch.randn(3, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    (graphed,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert torch.equal(plain, graphed)
    assert graphed.requires_grad
