"""The arms on their model: the same sites for all, ranks of equal numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorary.analysis.comparison.record import Arm
from lorary.errors import ConfigError
from lorary.train.compare.arms import fitted_arms
from lorary.train.compare.bench import Bench
from lorary.train.compare.request import Request, make_request
from lorary.train.compare.settings import Settings
from lorary.train.config.load import from_dict
from tests.train.compare.tiny import tree

RATES = (1e-3,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arms")


@pytest.fixture(scope="module")
def words(place: Path) -> dict[str, Any]:
    return tree(place)


def arm(name: str, **method: Any) -> Arm:
    return Arm(name, {"name": name, **method}, RATES)


def fitted(words: dict[str, Any], place: Path, *arms: Arm, **settings: Any) -> tuple[Request, dict[str, int]]:
    """The request on its model, and the numbers that each arm trains."""
    request = make_request(from_dict(words), arms, Settings(general=(), **settings), place / "comparison")
    bench = Bench(request)
    request = fitted_arms(dataclasses.replace(request, steps=6), bench.any_plan)
    return request, {one.name: Bench(request).plan(one).plan.trainable for one in request.arms}


def test_ranks_stay_as_they_are_unless_numbers_are_to_be_equal(words: dict[str, Any], place: Path) -> None:
    request, _ = fitted(words, place, arm("lora", r=4), arm("dora", r=8))
    assert [dict(one.method) for one in request.arms] == [{"name": "lora", "r": 4}, {"name": "dora", "r": 8}]


def test_the_layers_of_the_configuration_are_those_of_every_arm_without_targets(
    words: dict[str, Any], place: Path
) -> None:
    common = {"name": "lora", "exclude": "down_proj", "layers": "0"}
    own = Arm("own", {"name": "lora", "targets": "q_proj"}, RATES)
    arms = arm("lora", r=2), arm("dora", r=2), own, arm("ia3")
    request = make_request(from_dict(words | {"method": common}), arms, Settings(general=()), place / "comparison")
    sites = {one.name: {s.site.name for s in Bench(request).plan(one).plan.sites} for one in arms}
    assert sites["lora"] == sites["dora"]
    assert {name.split(".")[2] for name in sites["lora"]} == {"0"}
    assert {name.rpartition(".")[2] for name in sites["lora"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    }
    assert sites["own"] == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert any("down_proj" in name for name in sites["ia3"])  # it has places of its own


def test_equal_numbers_give_every_arm_the_nearest_rank(words: dict[str, Any], place: Path) -> None:
    """VeRA trains r + out numbers for each site, LoRA r (in + out); full fine-tuning has no rank."""
    arms = arm("lora", r=3), arm("dora", r=16), arm("vera", r=4), arm("full")
    request, numbers = fitted(words, place, *arms, match="parameters")
    r = {one.name: one.method.get("r") for one in request.arms}
    assert (r["lora"], r["full"]) == (3, None)
    assert r["dora"] == 2  # its magnitudes are as many as a third of LoRA's numbers
    target = numbers["lora"]
    for name in ("dora", "vera"):
        for other in (r[name] - 1, r[name] + 1):
            plan = _numbers(words, place, arm(name, r=other))
            assert abs(numbers[name] - target) <= abs(plan - target)


def _numbers(words: dict[str, Any], place: Path, one: Arm) -> int:
    return fitted(words, place, one)[1][one.name]


def test_the_reference_may_be_any_arm(words: dict[str, Any], place: Path) -> None:
    request, numbers = fitted(words, place, arm("vera", r=4), arm("lora", r=1), match="parameters", reference="lora")
    assert [one.method["r"] for one in request.arms] == [37, 1]
    assert numbers == {"vera": 2 * (7 * 37 + 256), "lora": 2 * 512}


def test_the_targets_of_the_configuration_are_those_of_every_arm_without_its_own(
    words: dict[str, Any], place: Path
) -> None:
    words = words | {"method": {"targets": ["q_proj", "v_proj"]}}
    arms = arm("lora", r=2), arm("dora", r=2), arm("rslora", r=2, targets="mlp"), arm("full")
    request, _ = fitted(words, place, *arms)
    plans = {one.name: Bench(request).plan(one).plan for one in request.arms}
    names = {name: {site.site.name.rpartition(".")[2] for site in plan.sites} for name, plan in plans.items()}
    assert names == {
        "lora": {"q_proj", "v_proj"},
        "dora": {"q_proj", "v_proj"},
        "rslora": {"gate_proj", "up_proj", "down_proj"},
        "full": set(),
    }


def test_arms_that_adapt_other_layers_without_saying_so_are_refused(words: dict[str, Any], place: Path) -> None:
    """Its targets are those of the others, and an exception of its own makes them fewer."""
    arms = arm("lora", r=2), arm("dora", r=2, exclude="o_proj")
    with pytest.raises(ConfigError) as error:
        fitted(words, place, *arms)
    names = ", ".join(f"model.layers.{i}.self_attn.o_proj" for i in range(2))
    assert str(error.value) == (
        f"cannot compare:\n  - dora: adapts 12 layers, lora 14: {names} differ\n"
        "      hint: set method.targets to layers that all can adapt, or give the arm targets of its own"
    )


def test_the_numbers_are_those_of_the_papers(words: dict[str, Any], place: Path) -> None:
    model_numbers = _numbers(words, place, arm("lora", r=2))
    sites = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert model_numbers == 2 * sum(2 * (a + b) for a, b in sites)
