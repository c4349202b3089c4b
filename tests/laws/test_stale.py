"""Law 10 over every method: nothing is stale. And the faults that it catches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.houlsby import Bottleneck

from .cases import KINDS, Case, made_of, methods, possible
from .stale import ROUTES, nothing_is_stale
from .test_planted import case as of_lora
from .test_planted import known

METHODS = methods()
OTHERS = [k for k in KINDS if k.name in ("conv2d, dilated, reflecting", "embedding", "GPT-2 Conv1D")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every preset and every pair with DoRA, the method with a derived value; every method under `--laws=all`."""
    if metafunc.function is not test_nothing_is_stale:
        return
    every = metafunc.config.getoption("laws") == "all"
    chosen = {
        f"{name}-{kind.name}": case
        for name, method in METHODS.items()
        for kind in ([KINDS[0], *OTHERS] if every or name in ("dora", "glora") else [KINDS[0]])
        if (every or name in lorary.presets() or "dora" in name.split("+"))
        and method.delta is not None
        and possible(case := Case(method, kind))
    }
    metafunc.parametrize("case", chosen.values(), ids=chosen)


def test_nothing_is_stale(case: Case) -> None:
    nothing_is_stale(case)


class _Remembers(MagnitudeDirection):
    """Keeps its norm for as long as nothing that it looks at has changed."""

    def seen(self, layer: Any) -> Any:
        raise NotImplementedError

    def _norms(self, layer: Any) -> Tensor:
        last = vars(layer).get("last")
        if last is None or last[0] != self.seen(layer):
            last = vars(layer)["last"] = (self.seen(layer), super()._norms(layer).detach().clone())
        return last[1]


class RemembersByVersion(_Remembers):
    """Autograd's versions and the memory's addresses: what lorary 0.6 looked at."""

    def seen(self, layer: Any) -> Any:
        return [(t._version, t.data_ptr()) for t in (layer.weight, layer.params["A"], layer.params["B"])]


class RemembersTheWeight(_Remembers):
    """Trusts the frozen weight."""

    def seen(self, layer: Any) -> Any:
        return [t.detach().clone().tolist() for t in (layer.params["A"], layer.params["B"])]


class Never(_Remembers):
    """Computes it anew."""

    def seen(self, layer: Any) -> Any:
        return object()


def broken(join: type) -> set[str]:
    """The routes that catch it."""
    with known(join):
        subject, caught = of_lora(join=join()), set()
        for name, route in ROUTES.items():
            try:
                nothing_is_stale(subject, {name: route})
            except AssertionError:
                caught.add(name)
    return caught


def test_what_goes_past_versions_is_caught() -> None:
    hidden = {"copied_into_data", "data_averaged", "through_a_view", "through_numpy", "through_dlpack", "in_a_thread"}
    assert broken(RemembersByVersion) >= hidden
    assert "copied" not in broken(RemembersByVersion)


def test_a_frozen_weight_that_is_trusted_is_caught_by_every_route() -> None:
    assert broken(RemembersTheWeight) == set(ROUTES)


class RemembersItsFirstNumbers(Bottleneck):
    """Computes with the tensors of its first forward pass."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        first = vars(layer).setdefault("first", {role: p.detach().clone() for role, p in layer.params.items()})
        h = layer.run_base(x)
        middle = torch.nn.functional.gelu(h @ first["W1"].T + first["b1"])
        return h + middle @ first["W2"].T + first["b2"]


def test_a_stale_join_without_a_merged_form_is_caught() -> None:
    with known(RemembersItsFirstNumbers):
        subject = Case(made_of("houlsby").replace(join=RemembersItsFirstNumbers(3)), KINDS[0])
        with pytest.raises(AssertionError, match="stale"):
            nothing_is_stale(subject, {"copied": ROUTES["copied"]})
        nothing_is_stale(Case(made_of("houlsby"), KINDS[0]), {"copied": ROUTES["copied"]})


def test_the_honest_one_passes() -> None:
    assert broken(Never) == set()


def test_functional_calls_use_the_tensors_they_are_given() -> None:
    subject = Case(lorary.method("dora", r=3), KINDS[0])
    model, x = subject.trained().eval(), subject.x()
    before = model(x)
    given = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, given, (x,))
    assert torch.equal(model(x), before)
    model.load_state_dict(given, strict=False)
    torch.testing.assert_close(model(x), y)
