"""The optimizer's state by parameter name: what a resumed run needs to go on bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorary.errors import TrainingError
from lorary.train.trainer import optimizer_state


class Routed(nn.Module):
    """Two layers, of which the second is used only when it is asked for, as an expert is."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.expert = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, routed: bool) -> torch.Tensor:
        y = self.always(x)
        return self.expert(y) if routed else y


def step(model: nn.Module, optimizer: torch.optim.Optimizer, routed: bool) -> None:
    model(torch.ones(1, 3), routed).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def test_a_parameter_that_had_no_gradient_yet_starts_its_moments_when_it_has_one() -> None:
    model = Routed()
    optimizer = adamw(model)
    step(model, optimizer, routed=False)
    saved = copy.deepcopy(optimizer_state.capture(optimizer, model))
    assert set(saved["state"]) == {"always.weight", "always.bias"}
    again = copy.deepcopy(model)
    other = adamw(again)
    optimizer_state.restore(other, again, saved)
    for _ in range(2):
        step(model, optimizer, routed=True)
        step(again, other, routed=True)
    for here, there in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(here, there)


def test_capturing_does_not_touch_an_optimizer_that_has_made_no_step() -> None:
    model = Routed()
    optimizer = adamw(model)
    assert optimizer_state.capture(optimizer, model)["state"] == {}
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_other_parameters_are_named() -> None:
    model = Routed()
    saved = optimizer_state.capture(adamw(model), model)
    with pytest.raises(TrainingError) as refused:
        optimizer_state.restore(torch.optim.AdamW(model.always.parameters()), model, saved)
    assert str(refused.value) == (
        "the checkpoint holds another optimizer's state:\n"
        "  - group 0: expert.bias is only in the checkpoint\n"
        "  - group 0: expert.weight is only in the checkpoint"
    )
