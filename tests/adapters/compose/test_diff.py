"""Two adapters compared: norms, cosines and angles of the dense updates, and what only one of them has."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.compose.diff import principal_angles
from lorary.errors import MethodError
from tests.adapters.test_change_rank import dense, trained


def changed(adapter: lorary.Adapter, site: str, role: str, value: Tensor) -> lorary.Adapter:
    roles = dict(adapter.tensors[site]) | {role: value}
    return dataclasses.replace(adapter, tensors=dict(adapter.tensors) | {site: roles})


def test_the_same_adapter_is_identical() -> None:
    adapter, _ = trained("lora")
    found = lorary.diff(adapter, trained("lora")[0])
    assert found.identical
    assert str(found) == "identical bit for bit: method, sites and tensors"
    assert {s.difference for s in found.sites} == {0.0}
    assert all(angle < 1e-6 for s in found.sites for angle in (*s.output_angles, *s.input_angles))
    one = changed(adapter, "plain", "B", torch.nextafter(adapter.tensors["plain"]["B"], torch.tensor(9.0)))
    found = lorary.diff(adapter, one)
    assert not found.identical
    assert [s.site for s in found.worst if s.difference] == ["plain"]
    assert 0 < found.worst[0].relative < 1e-6
    assert "1 of 4 common sites differ" in str(found)


PAIRS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("lora",), ("rslora",)),
    (("pissa",), ("adalora",)),
    (("vera",), ("melora",)),
    (("multilora",), ("o-lora",)),
]


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: " against ".join(n for (n,) in names))
def test_every_number_is_that_of_the_dense_updates(names: Any) -> None:
    a, b = (trained(*each, targets=["plain", "c_attn"])[0] for each in names)
    found = lorary.diff(a, b)
    assert [s.site for s in found.sites] == ["plain", "c_attn"]
    for s in found.sites:
        x, y = dense(a, s.site), dense(b, s.site)
        site = next(p.site for p in a.sites if p.site.name == s.site)
        assert x.shape == (site.out_features, site.in_features)
        assert s.a == pytest.approx(float(x.norm()), rel=1e-5)
        assert s.b == pytest.approx(float(y.norm()), rel=1e-5)
        assert s.difference == pytest.approx(float((x - y).norm()), rel=1e-5)
        assert s.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)
        for angles, (U, V) in ((s.output_angles, (x, y)), (s.input_angles, (x.T, y.T))):
            cosines = torch.linalg.svdvals(space(U).T @ space(V)).clamp(max=1)
            torch.testing.assert_close(torch.tensor(angles).deg2rad().cos(), cosines.float(), rtol=1e-4, atol=1e-4)
    assert any(line.startswith("method, delta: ") or line.startswith("method, ") for line in found.notes)


def space(W: Tensor) -> Tensor:
    U, S, _ = torch.linalg.svd(W, full_matrices=False)
    return U[:, S.gt(1e-6 * S[0])]


def test_planted_angles_are_found() -> None:
    """A plane turned by 3e-7, 40 and 90 degrees: a small angle is not lost in the rounding of its cosine."""
    turns = torch.tensor([3e-7, 40.0, 90.0], dtype=torch.float64).deg2rad()
    U = torch.eye(8, dtype=torch.float64)[:, :3]
    V = torch.zeros(8, 3, dtype=torch.float64)
    V[range(3), range(3)], V[range(3, 6), range(3)] = turns.cos(), turns.sin()
    assert principal_angles(U, V) == pytest.approx((3e-7, 40.0, 90.0), rel=1e-6)
    assert principal_angles(U[:, 1:2], V) == pytest.approx((40.0,))
    assert principal_angles(U, V[:, :0]) == ()


def test_a_scaled_adapter_has_cosine_one_and_a_negated_one_minus_one() -> None:
    adapter, _ = trained("lora", targets=["plain"])
    for factor in (0.5, -1.0):
        found = lorary.diff(adapter, changed(adapter, "plain", "B", factor * adapter.tensors["plain"]["B"]))
        (s,) = found.sites
        assert s.cosine == pytest.approx(math.copysign(1, factor))
        assert s.relative == pytest.approx(1 - factor)
        assert max(s.output_angles) < 1e-5
    zero = lorary.diff(adapter, changed(adapter, "plain", "B", torch.zeros(24, 4))).sites[0]
    assert (zero.output_angles, zero.relative) == ((), 1.0)
    assert math.isnan(zero.cosine)


def test_what_only_one_of_them_has() -> None:
    a, _ = trained("lora", targets=["plain", "conv"], full=("conv.bias",))
    b, _ = trained("dora", targets=["plain", "embed"])
    b = dataclasses.replace(b, base=dataclasses.replace(b.base, name="other"))
    found = lorary.diff(a, b)
    assert (found.only_a, found.only_b, found.only_full_a) == (("conv",), ("embed",), ("conv.bias",))
    text = str(found)
    assert "only A adapts conv" in text
    assert "only A holds in full conv.bias" in text
    assert "method, full: conv.bias in A, none in B" in text
    assert "method, join: Add() in A, MagnitudeDirection(exact=False) in B" in text
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["site"] == "plain"
    again, _ = trained("dora", targets=["plain", "embed"])
    other = changed(again, "plain", "m", 2 * again.tensors["plain"]["m"])
    found = lorary.diff(again, other)
    assert found.sites[1].others == {"m": 0.5}
    assert "1 sites differ in other tensors, most plain: m by 50.00%" in str(found)


def test_parameters_in_full_and_the_base_are_compared() -> None:
    a, _ = trained("lora", targets=["plain"], full=("conv.bias",))
    b = dataclasses.replace(a, full={"conv.bias": 2 * a.full["conv.bias"]})
    b = dataclasses.replace(b, base=dataclasses.replace(b.base, weights="f" * 64))
    found = lorary.diff(a, b)
    assert found.full == {"conv.bias": pytest.approx(0.5)}
    assert "1 of 1 parameters trained in full differ, most conv.bias, by 50.00%" in str(found)
    assert any(note.startswith("base, weights: ") for note in found.notes)


def test_layers_of_other_sizes_are_named() -> None:
    a, _ = trained("lora", targets=["plain"])
    other = torch.nn.ModuleDict({"plain": torch.nn.Linear(24, 12)})
    b = lorary.Adapter.of(lorary.attach(other, lorary.plan(other, lorary.method("lora", r=2), ["plain"])))
    found = lorary.diff(a, b)
    assert found.sites == ()
    assert found.other_shapes == {"plain": "linear [24, 24] in A, linear [12, 24] in B"}


def test_many_sites_are_folded() -> None:
    model = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(4, 4) for i in range(14)})
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        copy = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in model})
        lorary.attach(copy, lorary.plan(copy, lorary.method("lora", r=1), "re:l.*"))
        with torch.no_grad():
            for p in copy.parameters():
                p.add_(torch.randn_like(p))
        adapters.append(lorary.Adapter.of(copy))
    lines = str(lorary.diff(*adapters)).splitlines()
    assert lines[-1] == "and 4 more"
    assert [len(lorary.diff(*adapters).rows(most)) for most in (3, 14, 20)] == [4, 14, 14]


def test_bad_adapters_are_refused() -> None:
    adapter, _ = trained("lora", targets=["plain"])
    with pytest.raises(MethodError, match=r"a: is a str, not an Adapter(.|\n)*b: is a NoneType, not an Adapter"):
        lorary.diff("one", None)  # type: ignore[arg-type]
    broken = changed(adapter, "plain", "A", torch.full((4, 24), math.nan))
    with pytest.raises(MethodError, match="B: 'plain: A': 96 of 96 values are NaN or infinite"):
        lorary.diff(adapter, broken)
    missing = dataclasses.replace(adapter, tensors={"plain": {"A": adapter.tensors["plain"]["A"][:2]}})
    with pytest.raises(MethodError) as caught:
        lorary.diff(missing, broken)
    for sentence in ("A: plain: A is (2, 24), expected (4, 24)", "A: plain: B is missing", "B: 'plain: A': 96 of 96"):
        assert sentence in str(caught.value)
