"""Components: frozen dataclasses known by their names, and the values of their fields."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorary.spec import interfaces
from lorary.spec.fields import (
    AMOUNT,
    COUNT,
    FLAG,
    POSITIVE,
    SEED,
    SHARE,
    SIZES,
    STEPS,
    WHOLE,
    as_steps,
    one_of,
    optional,
)
from lorary.spec.site import Site


def test_a_component_is_a_frozen_dataclass_with_a_unique_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "COMPONENTS", dict(interfaces.COMPONENTS))

    class Fresh:
        r: int

    made = interfaces.component(Fresh)
    assert interfaces.COMPONENTS["Fresh"] is made
    assert made(3) == made(r=3) != made(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made(3).r = 4
    already = interfaces.component(dataclasses.make_dataclass("Already", ["r"], frozen=True))
    assert interfaces.component(already) is already
    with pytest.raises(TypeError, match="the component Fresh is already registered"):
        interfaces.component(dataclasses.make_dataclass("Fresh", ["r"], frozen=True))
    with pytest.raises(TypeError):
        interfaces.component(int)


@pytest.mark.parametrize("value", [1, 16, 10**9])
def test_a_count(value: object) -> None:
    assert COUNT["check"](value)
    assert POSITIVE["check"](value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "3", None, float("nan")])
def test_no_count(value: object) -> None:
    assert not COUNT["check"](value)


@pytest.mark.parametrize("value", [0, -1.5, True, "3", None, float("nan"), float("inf"), 1 + 0j])
def test_no_positive_number(value: object) -> None:
    assert not POSITIVE["check"](value)


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1])
def test_a_seed(value: object) -> None:
    assert SEED["check"](value)


@pytest.mark.parametrize("value", [-1, 2**63, True, 1.0, "3", None])
def test_no_seed(value: object) -> None:
    assert not SEED["check"](value)


@pytest.mark.parametrize(("value", "fits"), [(True, True), (False, True), (1, False), (0, False), ("yes", False)])
def test_a_flag(value: object, fits: bool) -> None:
    assert FLAG["check"](value) == fits


@pytest.mark.parametrize(("value", "fits"), [(None, True), (4, True), (0, False), ("four", False)])
def test_an_optional_count(value: object, fits: bool) -> None:
    assert optional(COUNT)["check"](value) == fits
    assert optional(COUNT)["expects"] == "a whole number of at least 1, or None"


NAN, INF = float("nan"), float("inf")
ENDLESS = 10**400  # no float holds it
SEVERAL = torch.tensor([1, 2])  # neither true nor false


@pytest.mark.parametrize(
    ("field", "fitting", "others"),
    [
        (WHOLE, [0, 1, 10**9], [-1, True, False, 1.0, 0.0, "1", None, NAN, ENDLESS, SEVERAL]),
        (POSITIVE, [1, 0.5, 1e308], [0, -1, True, "1", None, NAN, INF, ENDLESS, -ENDLESS, SEVERAL]),
        (AMOUNT, [0, 0.0, 1e-9, 7], [-1e-9, True, False, "0", None, NAN, INF, ENDLESS, SEVERAL]),
        (SHARE, [1e-9, 0.85, 0.999], [0, 1, 1.5, -0.1, True, "0.5", None, NAN, INF, ENDLESS]),
        (STEPS, [0, 0.1, 0.999, 1, 50, 50.0], [1.5, 50.5, -1, True, "1", None, NAN, INF, ENDLESS, SEVERAL]),
        (SIZES, [(), (1,), (8, 2)], [(0,), (8, 2.0), (True,), [8], 8, None, ("8",), (ENDLESS,)]),
        (one_of("authors", "paper"), ["authors", "paper"], ["", "Paper", None, 1, ["paper"], ("paper",)]),
    ],
    ids=["whole", "positive", "amount", "share", "steps", "sizes", "one of"],
)
def test_what_fields_take(field: dict[str, object], fitting: list[object], others: list[object]) -> None:
    assert [value for value in fitting if not field["check"](value)] == []
    assert [value for value in others if field["check"](value)] == []


def test_steps_as_a_share_and_as_a_number() -> None:
    assert [as_steps(said, 90) for said in (0, 0.1, 0.5, 0.999, 1, 30.0)] == [0, 9, 45, 90, 1, 30]


AXES = {"delta": interfaces.Delta, "init": interfaces.Init, "join": interfaces.Join}


@pytest.mark.parametrize("name", sorted(interfaces.COMPONENTS))
def test_a_component_has_one_axis(name: str) -> None:
    """The protocols are told apart by inheritance, so that `isinstance` is enough."""
    cls = interfaces.COMPONENTS[name]
    assert sum(axis in cls.__mro__ for axis in AXES.values()) <= 1


def test_a_component_inherits_the_defaults_of_its_protocol() -> None:
    """A component with nothing but the required members works."""

    @dataclasses.dataclass(frozen=True)
    class Quiet(interfaces.Delta):
        r: int = 1
        roles = frozenset({"A", "B"})

    @dataclasses.dataclass(frozen=True)
    class Still(interfaces.Join):
        pass

    @dataclasses.dataclass(frozen=True)
    class Silent(interfaces.Init):
        fills = frozenset({"A", "B"})

    delta, join, init = Quiet(), Still(), Silent()
    assert isinstance(delta, interfaces.Delta)
    assert (delta.shared, delta.join_roles, delta.arbitrary_factors) == (frozenset(), frozenset(), False)
    assert (delta.fixed_roles, dict(delta.role_aliases), delta.fused_for_all_kinds) == (frozenset(), {}, False)
    assert (join.roles, join.uses) == (frozenset(), frozenset())
    site = Site("x", "linear", 3, 2, False)
    assert join.shapes(site) == {}
    assert (init.residual_init, init.zeros(site)) == (False, frozenset())
    assert delta.problems(site) == join.problems(site) == init.problems(site, 1) == []


def test_a_rule_without_methods_does_nothing() -> None:
    @dataclasses.dataclass(frozen=True)
    class Idle(interfaces.Rule):
        needs = frozenset()

    rule = Idle()
    state = rule.start([], 10)
    assert (state, rule.penalty([], state), rule.report([], state), rule.problems(None)) == ({}, 0.0, {}, [])
    assert not rule.needs_optimizer
    done = [rule.before_step([], state, 1), rule.after_backward([], state, 1), rule.after_step([], state, 1, None)]
    assert done == [None] * 3


def test_every_component_is_frozen_and_checks_its_fields() -> None:
    for name, cls in interfaces.COMPONENTS.items():
        assert cls.__name__ == name
        assert cls.__dataclass_params__.frozen, f"{name} could be changed after it was checked"
        for field in dataclasses.fields(cls):
            assert {"check", "expects"} <= set(field.metadata), f"{name}.{field.name} is not checked"
