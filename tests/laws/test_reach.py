"""The law of reach: a layer that the model calls is adapted and learns; one whose weight it reads past is refused.

Every method on a linear layer and every kind of layer with LoRA and DoRA, or the whole product with `--laws=all`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers
from lorary.model import planning, scan
from lorary.model.reach.proof import Reach
from lorary.spec.calibration import CalibratedInit

from .cases import KINDS, Case, Kind, methods, possible, seed
from .test_planted import CutsTheGradient, known

LINEAR = next(kind for kind in KINDS if kind.name == "linear")
CASES = {
    (name, kind.name): case
    for name, method in methods().items()
    for kind in KINDS
    if kind.experts == 1  # whose module is called, and no layer of its own
    if method.delta is not None and possible(case := Case(method, kind))
}


class Bypassing(nn.Module):
    """A layer that is called, and one of the same kind whose weight is read.

    Args:
        kind: of the layers.
        read: how the weight is read: by the forward itself, or by a function that gets the layer.
    """

    def __init__(self, kind: Kind, read: Callable[[Any], Tensor] | None) -> None:
        super().__init__()
        seed(1)
        self.name, self.read = kind.layer, read
        setattr(self, kind.layer, kind.make())
        self.dead = kind.make()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(self, self.name)(x)
        return y + (self.dead.weight.square().sum() if self.read is None else self.read(self.dead))


def squares(layer: Any) -> Tensor:
    """A helper that reads a weight where the source of the forward does not show it."""
    total: Tensor = layer.weight.square().sum()
    return total


def live_layers_are_adapted_and_bypassed_ones_refused(case: Case) -> None:
    """By name and by preset; by the source of the forward, and by a dry forward where the source hides it."""
    for read, example in ((None, None), (squares, case.x())):
        net = Bypassing(case.kind, read)
        with pytest.raises(PlanError, match=r"dead: .*reads its weight and never calls it"):
            lorary.plan(net, case.method, targets=["dead", case.kind.target], example=example)
        preset = next((p for p in ("conv", "embedding") if case.kind.name.startswith(p)), "all-linear")
        targets = [case.kind.target] if case.kind.adapted else preset
        plan = lorary.plan(net, case.method, targets=targets, example=example)
        assert [p.site.name for p in plan.sites] == [case.kind.layer]
        assert case.kind.adapted or any(f"`{preset}` leaves out dead: " in note for note in plan.notes)
        assert plan.unproved == (() if read else (case.kind.layer,))
        data = [case.x()] if isinstance(case.method.init, CalibratedInit) else None
        learns(lorary.attach(net, plan, data=data, loss=lambda y, _: y.square().sum()), case)


def learns(net: nn.Module, case: Case) -> None:
    """Every tensor that trains gets a gradient from one forward, once training has moved it."""
    (layer,) = adapted_layers(net).values()
    with torch.no_grad():
        for p in layer.params.values():
            p.add_(torch.randn_like(p) * 0.3)
    net(case.x()).square().sum().backward()
    for role in case.method.trained & set(layer.params):
        gradient = layer.params[role].grad
        assert gradient is not None, role
        assert bool(gradient.any()), role
    assert not layer._forward_pre_hooks, "the proof of the first forward is still there"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises the law with the cases that `--laws` asks for."""
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("laws") == "all"
        chosen = [names for names in CASES if every or names[1] == "linear" or names[0] in ("lora", "dora")]
        metafunc.parametrize("case", [pytest.param(CASES[names], id="-".join(names)) for names in chosen])


def test_the_law_of_reach(case: Case) -> None:
    live_layers_are_adapted_and_bypassed_ones_refused(case)


def test_every_method_with_adapters_is_covered() -> None:
    adapting = {name for name, method in methods().items() if method.delta is not None and method.context is None}
    assert {name for name, kind in CASES if kind == "linear"} == adapting


# --- planted faults ---------------------------------------------------------------------------------------------------

LORA = CASES["lora", "linear"]


def caught(case: Case = LORA) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, PlanError)):
        live_layers_are_adapted_and_bypassed_ones_refused(case)


def test_a_plan_that_does_not_read_the_source_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "bypasses", lambda modules: {})
    caught()


def test_a_plan_without_dry_forwards_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "proved", lambda scanned, example: (scanned, Reach()))
    caught()


def test_a_plan_that_refuses_live_layers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = planning.proved

    def suspicious(scanned: Any, example: Any) -> Any:
        bypass = scan.Bypass("", called=True)
        modules = {path: dataclasses.replace(m, bypass=bypass) for path, m in scanned.modules.items() if m.kind}
        return honest(dataclasses.replace(scanned, modules={**scanned.modules, **modules}), example)

    monkeypatch.setattr(planning, "proved", suspicious)
    caught()


def test_an_adapter_that_never_learns_is_caught() -> None:
    with known(CutsTheGradient):
        caught(Case(dataclasses.replace(lorary.method("lora", r=3, alpha=6.0), delta=CutsTheGradient(3)), LINEAR))


def test_the_honest_plan_passes_what_the_planted_ones_fail() -> None:
    live_layers_are_adapted_and_bypassed_ones_refused(LORA)
