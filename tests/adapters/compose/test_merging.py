"""Slerp, TIES, DARE and pruning: against PEFT's functions and closed formulas on the same dense updates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

import lorary
from lorary.adapters.compose.merging import generator_of
from tests.adapters.compose.models import adapter, base, changes, near, products, trained

NAMES = ("lora", "pissa", "rslora")
WEIGHTS = (0.5, 0.75, 0.3)


def dense(site: str) -> list[Tensor]:
    """The dense updates of one site, in 32 bits, as a merge sees them."""
    found = [adapter(name).low_rank()[site] for name in NAMES]
    return [form.B @ form.A for form in found]


def theirs(how: str, site: str, weights: Any, density: float) -> Tensor:
    """PEFT's merge of the same updates."""
    function = getattr(
        merge_utils, {"magnitude": "magnitude_prune", "dare": "dare_linear"}.get(how, how.replace("-", "_"))
    )
    torch.manual_seed(generator_of(f"0/{site}").initial_seed())
    return function(dense(site), torch.tensor(weights), density)  # type: ignore[no-any-return]


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("how", ["magnitude", "dare", "ties", "dare-ties"])
def test_a_merge_of_elements_is_peft_s(how: str, density: float) -> None:
    values = [adapter(name) for name in NAMES]
    mixed = lorary.mix(values, WEIGHTS, how=how, density=density, energy=1.0)
    for site, product in products(mixed).items():
        near(product, theirs(how, site, WEIGHTS, density).double(), 1e-5)


@pytest.mark.parametrize("how", ["ties", "dare-ties"])
def test_a_negative_weight_votes_with_the_opposite_sign(how: str) -> None:
    """It is the merge of the turned update with a positive weight."""
    values = [adapter("lora"), adapter("pissa")]
    subtracted = lorary.mix(values, [1, -0.5], how=how, density=0.4, energy=1.0)
    turned = lorary.mix([values[0], lorary.mix([values[1]], [-1])], [1, 0.5], how=how, density=0.4, energy=1.0)
    for site, product in products(turned).items():
        near(products(subtracted)[site], product, 1e-5)
    two, one = products(subtracted)["plain"], dense("plain")[0].double()
    assert (two * one > 0).float().mean() > 0.2  # it is no zero


@pytest.mark.parametrize("how", ["magnitude", "ties", "dare"])
def test_the_error_of_a_merge_of_elements_is_told(how: str) -> None:
    values = [adapter(name) for name in NAMES]
    mixed = lorary.mix(values, WEIGHTS, how=how)
    told: Any = mixed.provenance.settings  # type: ignore[union-attr]
    lost, norms = 0.0, 0.0
    for site, product in products(mixed).items():
        target = theirs(how, site, WEIGHTS, 0.2).double()
        gap, norm = float((product - target).norm()), float(target.norm())
        assert told["errors"][site] == pytest.approx(gap / norm, rel=1e-3, abs=1e-6)
        lost, norms = lost + gap**2, norms + norm**2
    assert told["error"] == pytest.approx(math.sqrt(lost / norms), rel=1e-3)
    assert 0.1 < told["error"] < 1
    assert told["density"] == 0.2
    assert ("seed" in told) == (how == "dare")
    sums = {s.site.name: s.r for s in lorary.mix(values).sites}
    assert all(s.r <= sums[s.site.name] for s in mixed.sites)


def test_dare_follows_its_seed() -> None:
    values = [adapter("lora"), adapter("pissa")]
    state = torch.get_rng_state()
    one, again, other = (lorary.mix(values, how="dare", density=0.5, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.tensors["plain"]["A"], again.tensors["plain"]["A"])
    assert not torch.equal(one.tensors["plain"]["A"], other.tensors["plain"]["A"])
    kept = lorary.mix([values[0]], how="dare", density=0.5, energy=1.0, seed=7)
    near(2 * dense("plain")[0].double() * (products(kept)["plain"].abs() > 1e-4), products(kept)["plain"], 1e-4)


def test_parameters_trained_in_full_are_merged_by_element_exactly() -> None:
    values = [trained(lorary.method("bitfit"), None, number) for number in (3, 4, 5)]
    mixed = lorary.mix(values, WEIGHTS, how="ties", density=0.5, base=base())
    before = dict(base().named_parameters())
    for name, value in mixed.full.items():
        updates = [a.full[name] - before[name].detach() for a in values]
        expected = merge_utils.ties(updates, torch.tensor(WEIGHTS), 0.5)
        torch.testing.assert_close(value, before[name].detach() + expected)
    assert "error" not in mixed.provenance.settings  # type: ignore[union-attr]


# --- slerp ------------------------------------------------------------------------------------------------------------


def arc(one: Tensor, other: Tensor, t: float) -> Tensor:
    """The published formula on dense vectors."""
    angle = torch.acos((one * other).sum() / (one.norm() * other.norm()))
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_slerp_is_the_arc_between_the_dense_updates(t: float) -> None:
    values = [adapter("lora"), adapter("pissa")]
    mixed = lorary.mix(values, [1 - t, t], how="slerp")
    one, other = map(changes, values)
    for site, product in products(mixed).items():
        near(product, arc(one[site], other[site], t))
    assert "error" not in mixed.provenance.settings  # type: ignore[union-attr]


def test_slerp_of_a_layer_that_one_has_and_of_equal_updates_is_a_line() -> None:
    short, long = adapter("lora of rank 5"), adapter("lora")
    mixed = products(lorary.mix([short, long], [0.25, 0.75], how="slerp"))
    near(mixed["embed"], 0.75 * changes(long)["embed"])
    same = products(lorary.mix([long, long], how="slerp"))
    for site, change in changes(long).items():
        near(same[site], change)
    against = products(lorary.mix([long, lorary.scale(long, -1)], [0.75, 0.25], how="slerp"))
    near(against["plain"], 0.5 * changes(long)["plain"], 1e-5)


def test_slerp_keeps_the_length_of_equally_long_updates() -> None:
    one = trained(lorary.method("lora", r=3), ("plain",), 3)
    other = trained(lorary.method("lora", r=3), ("plain",), 4)
    length = float(changes(one)["plain"].norm())
    other = lorary.scale(other, length / float(changes(other)["plain"].norm()))
    assert float(products(lorary.mix([one, other], how="slerp"))["plain"].norm()) == pytest.approx(length, rel=1e-5)
    assert float(products(lorary.mix([one, other], [0.5, 0.5]))["plain"].norm()) < 0.95 * length
