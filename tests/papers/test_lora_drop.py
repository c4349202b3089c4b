"""LoRA-drop: the layers that are not kept train one LoRA in common. (The choice itself: `tests/test_lora_drop.py`.)"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import Adapter
from lorary.analysis.importance import drop_layers
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers
from lorary.methods.lora_drop import Importance, Measured
from lorary.model import plan

NAMES = [f"layers.{i}.{kind}" for i in range(4) for kind in ("up", "down")]
KEPT = ["layers.2.up", "layers.0.down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plan_of(model: nn.Module, *names: str) -> lorary.Plan:
    """Of eight layers two are kept; three `up` share one LoRA, and three `down` another."""
    plan = lorary.plan(model, lorary.method(*names, **{"r": 2, "alpha": 4.0}))
    return drop_layers(plan, Importance(tuple(Measured(n, 9.0 if n in KEPT else 0.1, 0.1) for n in NAMES)), 0.9)


def started(*names: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Net().to(dtype)
    return lorary.attach(model, plan_of(model, *names), dtype=dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 6, generator=generator).to(dtype), torch.randn(9, 6, generator=generator).to(dtype)


def train(model: nn.Module, steps: int = 5, **settings: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.02, **settings))
    x, y = batch(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return optimizer


def sets(model: nn.Module, role: str) -> dict[str, list[str]]:
    """The sites by the one tensor that they hold."""
    found: dict[int, list[str]] = {}
    for name, layer in adapted_layers(model).items():
        found.setdefault(id(layer.params[role]), []).append(name)
    return {names[0]: names for names in found.values()}


SHARED = {
    "layers.0.up": ["layers.0.up", "layers.1.up", "layers.3.up"],
    "layers.0.down": ["layers.0.down"],
    "layers.1.down": ["layers.1.down", "layers.2.down", "layers.3.down"],
    "layers.2.up": ["layers.2.up"],
}


def test_layers_that_are_not_kept_hold_the_same_tensors() -> None:
    model = started()
    for role in "AB":
        assert sets(model, role) == SHARED
    train(model)
    for role in "AB":
        assert sets(model, role) == SHARED
    other = copy.deepcopy(model)
    assert sets(other, "A") == SHARED
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_nothing_moves_at_the_start() -> None:
    x, _ = batch()
    assert torch.equal(started()(x), Net()(x))
    assert torch.equal(started("rslora")(x), Net()(x))


def counted(model: nn.Module) -> None:
    """What is shared counts once: in the plan, among the parameters, in the optimizer."""
    once = 4 * 2 * (6 + 9)
    plan = plan_of(Net())
    assert plan.trainable == once
    assert plan.adapter_bytes == 4 * once
    assert plan.training_bytes == 12 * once
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == once
    grouped = [p for group in lorary.param_groups(model, 0.1, weight_decay=0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == 8
    assert Adapter.of(model).size == 4 * once


def test_what_is_shared_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(started())
    monkeypatch.setattr(plan, "unique_tensor_sets", list)  # planted: every site counts its own
    with pytest.raises(AssertionError):
        counted(started())


def test_gradients_of_what_is_shared_are_summed() -> None:
    """As if each layer had a copy of its own, and their gradients were added up."""
    model = started(dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    apart = Net().double()
    lorary.attach(apart, lorary.plan(apart, lorary.method(r=2, alpha=4.0)), dtype=torch.float64)
    for mine, its in zip(adapted_layers(model).values(), adapted_layers(apart).values(), strict=True):
        its.load({role: p.detach() for role, p in mine.params.items()})
    x, y = batch(torch.float64)
    for each in (model, apart):
        (each(x) - y).square().mean().backward()
    for names in SHARED.values():
        for role in "AB":
            expected = sum(adapted_layers(apart)[name].params[role].grad for name in names)
            torch.testing.assert_close(
                adapted_layers(model)[names[0]].params[role].grad, expected, rtol=1e-12, atol=1e-14
            )


def test_a_step_moves_what_is_shared_once() -> None:
    """Decoupled decay alone shrinks a tensor by 1 - lr * decay, however many layers hold it."""
    model = started()
    before = {name: layer.params["A"].detach().clone() for name, layer in adapted_layers(model).items()}
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, layer in adapted_layers(model).items():
        torch.testing.assert_close(layer.params["A"].detach(), before[name] * 0.95)


@pytest.mark.parametrize("names", [("lora",), ("rslora", "lora+"), ("melora",), ("multilora",), ("lora-fa",)])
def test_every_form_of_the_finished_adapter_is_the_same_function(names: tuple[str, ...], tmp_path: Path) -> None:
    """Other programs get a copy for every layer."""
    model = Net()
    plan = plan_of(model, "lora") if names == ("lora",) else None
    if plan is None:
        # a ratio of 16 drives what goes into tanh to hundreds, where its rounding comes out a hundred times as large
        options = {"melora": {"n": 3}, "lora+": {"ratio": 2.0}}
        method = lorary.method(*names, r=2, **options.get(names[-1], {}))
        whole = lorary.plan(model, method)
        plan = drop_layers(whole, Importance(tuple(Measured(n, 9.0 if n in KEPT else 0.1, 0.1) for n in NAMES)), 0.9)
    lorary.attach(model, plan)
    train(model)
    x, _ = batch()
    y = model(x).detach()
    assert (y - Net()(x)).abs().max() > 0.01
    adapter = Adapter.of(model)
    lorary.save(model, tmp_path / "own")
    again = lorary.load(Net(), tmp_path / "own", trainable=True)
    assert torch.equal(again(x), y)
    role = (
        "A"
        if "A" in adapted_layers(model)["layers.0.up"].params
        else next(iter(adapted_layers(model)["layers.0.up"].params))
    )
    assert sets(again, role) == SHARED, "they go on learning in common"
    export_peft(adapter, tmp_path / "peft")
    plain = lorary.load(Net(), tmp_path / "peft", trainable=True)
    assert (plain(x) - y).abs().max() < 2e-6 * y.abs().max()
    assert len(sets(plain, "A")) == 8
    assert (lorary.switch(Net(), adapter)(x) - y).abs().max() == 0
    kept = lorary.merge(model, keep=True)
    assert (kept(x) - y).abs().max() < 2e-6 * y.abs().max()
    assert torch.equal(lorary.unmerge(model)(x), y)


def test_taken_off_it_is_the_base() -> None:
    model = started()
    train(model)
    lorary.detach(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    straight = started()
    train(straight, 6)
    model = started()
    optimizer = train(model, 3)
    lorary.save(model, tmp_path / "a")
    again = lorary.load(Net(), tmp_path / "a", trainable=True)
    second = torch.optim.AdamW(lorary.param_groups(again, lr=0.02))
    second.load_state_dict(optimizer.state_dict())
    x, y = batch()
    for _ in range(3):
        second.zero_grad()
        (again(x) - y).square().mean().backward()
        second.step()
    assert torch.equal(again(x), straight(x))


def test_sites_that_cannot_share_are_refused() -> None:
    model = Net()
    plan = lorary.plan(model, lorary.method(r=2))
    shared = tuple(dataclasses.replace(p, share="all") for p in plan.sites)
    with pytest.raises(PlanError, match=r"layers\.0\.down: shares its tensors with layers\.0\.up"):
        lorary.attach(model, dataclasses.replace(plan, sites=shared))
    pissa = lorary.plan(model, lorary.method("pissa", r=2), "up")
    shared = tuple(dataclasses.replace(p, share="up") for p in pissa.sites)
    with pytest.raises(PlanError, match="shares its tensors, and SVDInit starts at the weight of each layer"):
        lorary.attach(model, dataclasses.replace(pissa, sites=shared))
    assert not adapted_layers(model)
