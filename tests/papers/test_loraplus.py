"""LoRA+: B learns `ratio` times faster than A, through every schedule; with ratio 1 it is LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorary
from lorary.layers.adapted import adapted_layers


def attached(*names: str, **options: float) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(48, 12), nn.Linear(12, 5))
    method = lorary.method(*names, r=4, **options)
    return lorary.attach(model, lorary.plan(model, method, ["conv", "all-linear"]))


def trained(model: nn.Module, steps: int = 5, decay: float = 0.0) -> list[torch.Tensor]:
    torch.manual_seed(2)
    x = torch.randn(4, 3, 8)
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.01, weight_decay=decay))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach() for layer in adapted_layers(model).values() for p in layer.params.values()]


@pytest.mark.parametrize("ratio", [16, 80, 2.5])
def test_groups_by_role(ratio: float) -> None:
    model = attached("lora+", ratio=ratio)
    rows = {row["name"]: row for row in lorary.param_groups(model, lr=0.001)}
    assert list(rows) == ["A", f"B x{ratio:g}"]
    slow, fast = rows["A"], rows[f"B x{ratio:g}"]
    assert slow["lr"] == 0.001
    assert fast["lr"] == 0.001 * ratio
    layers = adapted_layers(model).values()
    assert [id(p) for p in slow["params"]] == [id(layer.params["A"]) for layer in layers]
    assert [id(p) for p in fast["params"]] == [id(layer.params["B"]) for layer in layers]  # convolutions too


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    ],
    ids=["cosine", "warmup", "inverse", "steps"],
)
def test_the_ratio_survives_every_scheduler_step(schedule: object) -> None:
    optimizer = torch.optim.AdamW(lorary.param_groups(attached("lora+"), lr=0.001))
    scheduler = schedule(optimizer)  # type: ignore[operator]
    seen = set()
    for _ in range(12):
        optimizer.step()
        scheduler.step()
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert fast == pytest.approx(16 * slow, rel=1e-12)
        seen.add(slow)
    assert len(seen) > 2  # the schedule did move the rates


def test_with_ratio_one_it_is_lora_bit_for_bit() -> None:
    plus, plain = trained(attached("lora+", ratio=1)), trained(attached("lora"))
    assert all(torch.equal(a, b) for a, b in zip(plus, plain, strict=True))


def test_with_another_ratio_it_is_not() -> None:
    plus, plain = trained(attached("lora+", ratio=2)), trained(attached("lora"))
    assert not any(torch.equal(a, b) for a, b in zip(plus[1::2], plain[1::2], strict=True))


def test_the_first_adam_step_moves_b_by_its_own_rate() -> None:
    """A first Adam step moves every coordinate with a gradient by the learning rate."""
    model = attached("lora+", ratio=16)
    (_, B, *_) = trained(model, steps=1)
    moved = B[B != 0].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.16), rtol=1e-4, atol=0)


def test_decay_takes_part_in_each_group() -> None:
    rows = lorary.param_groups(attached("lora+"), lr=0.001, weight_decay=0.1)
    assert [(row["name"], row["weight_decay"]) for row in rows] == [("A decayed", 0.1), ("B x16 decayed", 0.1)]
