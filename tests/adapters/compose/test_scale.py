"""An adapter times a number: exact, and of its own method where that has a scale."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.errors import MethodError
from tests.adapters import models
from tests.adapters.compose.models import PLAIN, adapter, base, changes, near, products, trained
from tests.laws.cases import made_of


@pytest.mark.parametrize("name", PLAIN)
def test_a_scaled_adapter_keeps_its_method_tensors_and_rank(name: str) -> None:
    value = adapter(name)
    half = lorary.scale(value, 0.5)
    for site, change in changes(value).items():
        near(changes(half)[site], 0.5 * change, 1e-12)
    assert half.method.delta == value.method.delta
    assert [s.shapes for s in half.sites] == [s.shapes for s in value.sites]
    assert all(t is half.tensors[n][k] for n, roles in value.tensors.items() for k, t in roles.items())
    assert half.provenance is not None
    (parent,) = half.provenance.parents
    assert (half.provenance.how, parent.sha256, parent.weight) == ("scale", content_hash(value), 0.5)


@pytest.mark.parametrize("name", ["lora", "vera", "pissa", "adalora"])
def test_a_negative_factor_gives_the_opposite_update(name: str) -> None:
    value = adapter(name)
    opposite = changes(lorary.scale(value, -2))
    for site, change in changes(value).items():
        near(opposite[site], -2 * change)


def test_twice_and_halved_is_the_same_function() -> None:
    value = adapter("pissa")
    assert lorary.scale(lorary.scale(value, 2), 0.5).sites == value.sites


@pytest.mark.parametrize("name", ["lora", "rslora", "vera", "pissa"])
def test_a_scaled_adapter_is_saved_and_read_by_peft(name: str, tmp_path: Path) -> None:
    at = models.BASES[0]
    value = lorary.scale(trained(made_of(name), at.targets, model=at.model()), 0.3)
    expected = models.outputs(lorary.switch(at.model(), value))
    lorary.save_adapter(value, tmp_path / "saved")
    models.same(lorary.load_adapter(tmp_path / "saved"), value)
    lorary.adapters.export_peft(value, tmp_path / "peft")
    models.close(models.by_peft(at, tmp_path / "peft"), expected)


def test_what_was_trained_in_full_moves_by_its_change() -> None:
    value = trained(lorary.method("bitfit"), None)
    half = lorary.scale(value, 0.5, base=base())
    before = dict(base().named_parameters())
    for name, tensor in half.full.items():
        torch.testing.assert_close(tensor, (before[name] + value.full[name]).detach() / 2)


def test_a_quantised_residual_is_scaled_as_a_lora() -> None:
    value = trained(made_of("qlora", "pissa"), ("plain",))
    assert {type(s.init).__name__ for s in lorary.scale(value, 0.5).sites} == {"Kaiming"}


BAD: dict[str, tuple[Any, Any, str]] = {
    "a path": (lambda: "out", 2, "adapter: is a str, not an Adapter"),
    "zero": (lambda: adapter("lora"), 0, "factor: is 0, which leaves the base as it is"),
    "NaN": (lambda: adapter("lora"), float("nan"), "factor: is nan, not a finite number"),
    "400 digits": (lambda: adapter("lora"), 10**400, "0, not a finite number"),
    "more than 32 bits hold": (
        lambda: adapter("lora"),
        1e39,
        "embed: the weighted update there is NaN, or too large for 32-bit numbers",
    ),
    "a flag": (lambda: adapter("lora"), True, "factor: is True, not a finite number"),
    "DoRA": (
        lambda: trained(made_of("dora"), ("plain",)),
        0.5,
        "plain: the adapter gives its output a gain or a shift of its own (MagnitudeDirection)",
    ),
    "no base": (lambda: trained(lorary.method("bitfit"), None), 0.5, "base: the adapter trains 4 parameters in full"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_scaled(case: str) -> None:
    make, factor, sentence = BAD[case]
    with pytest.raises(MethodError) as refusal:
        lorary.scale(make(), factor)
    assert str(refusal.value).startswith("cannot scale this adapter:\n  - ")
    assert sentence in str(refusal.value)


def test_a_scale_beyond_32_bits_goes_into_the_factors() -> None:
    value = adapter("lora")
    tensors = {site: {role: t * 1e-10 for role, t in roles.items()} for site, roles in value.tensors.items()}
    large = lorary.scale(dataclasses.replace(value, tensors=tensors), 3e38)  # s would be 6e38
    assert {s.scale for s in large.sites} == {1.0}
    near(products(large)["plain"], 3e18 * products(lorary.mix([value], [0.5]))["plain"] * 2)


def test_numbers_of_numpy_are_factors() -> None:
    assert lorary.scale(adapter("lora"), np.float32(2)).method == lorary.scale(adapter("lora"), 2).method
