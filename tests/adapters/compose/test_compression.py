"""Compression by rank and by energy: the truncated SVD of every method's update, with ranks that differ by site."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.compose.compression import Size, Spectra
from lorary.adapters.content_hash import content_hash
from lorary.errors import LoraryError, MethodError
from tests.adapters.test_change_rank import LINEAR, X, base, dense, trained

METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("lora", "rslora", "lora+", "pissa", "olora", "multilora", "delta-lora")},
    **{name: {"targets": LINEAR} for name in ("lora-fa", "vera", "melora", "o-lora")},
    "adalora": {"targets": ["plain", "conv"]},
    "qlora": {"targets": LINEAR},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_truncated_to_a_plain_lora(name: str, tmp_path: Path) -> None:
    adapter, _ = trained(name, **METHODS[name])
    found = lorary.compress(adapter, rank=2)
    lost = total = 0.0
    for s in found.adapter.sites:
        before, after = dense(adapter, s.site.name), dense(found.adapter, s.site.name)
        S = torch.linalg.svdvals(before)
        tail = float(S[2:].norm())
        assert s.r == found.ranks[s.site.name] == 2
        assert float((after - before).norm()) == pytest.approx(tail, rel=1e-4, abs=1e-6 * float(S[0]))
        assert found.errors[s.site.name] == pytest.approx(tail / float(S.norm()), rel=1e-4, abs=1e-7)
        lost, total = math.hypot(lost, tail), math.hypot(total, float(S.norm()))
    assert found.error == pytest.approx(lost / total, rel=1e-4)
    lorary.save_adapter(found.adapter, tmp_path / "small")
    assert (tmp_path / "small" / "adapter_config.json").exists()  # a PEFT adapter, whatever it was
    again = lorary.load_adapter(tmp_path / "small")
    assert content_hash(again) == content_hash(found.adapter)
    torch.testing.assert_close(lorary.switch(base(), again)(X), lorary.switch(base(), found.adapter)(X))


def decaying(**changes: Any) -> lorary.Adapter:
    """Two sites whose singular values are (8, 4, 2, 1) and (3, 2, 1, 0.5)."""
    adapter, _ = trained("lora", targets=["plain", "conv"], alpha=4.0, **changes)
    tensors = {}
    for name, values in (("plain", (8.0, 4.0, 2.0, 1.0)), ("conv", (3.0, 2.0, 1.0, 0.5))):
        roles = adapter.tensors[name]
        U, V = torch.linalg.qr(roles["B"]).Q, torch.linalg.qr(roles["A"].T).Q
        tensors[name] = {"B": U * torch.tensor(values), "A": V.T.contiguous()}
    return dataclasses.replace(adapter, tensors=tensors)


# squares: 64, 16, 4, 1 and 9, 4, 1, 0.25; together 99.25
@pytest.mark.parametrize(
    ("energy", "ranks"),
    [
        (0.5, {"plain": 1, "conv": 0}),
        (0.8, {"plain": 2, "conv": 0}),
        (0.89, {"plain": 2, "conv": 1}),
        (0.95, {"plain": 3, "conv": 2}),
        (1.0, {"plain": 4, "conv": 4}),
    ],
)
def test_energy_keeps_the_largest_values_of_all_sites_together(energy: float, ranks: dict[str, int]) -> None:
    found = lorary.compress(decaying(), energy=energy)
    assert found.ranks == ranks
    assert {s.site.name for s in found.adapter.sites} == {name for name, r in ranks.items() if r}
    assert 1 - found.error**2 >= energy - 1e-6
    assert found.adapter.method.delta.r == max(ranks.values())  # type: ignore[union-attr]
    assert ("1 of 2 sites left out" in str(found)) == (0 in ranks.values())


def test_size_error_and_provenance_are_told(tmp_path: Path) -> None:
    adapter = decaying()
    found = lorary.compress(adapter, energy=0.89)
    numbers = 2 * (24 + 24) + (24 + 72)
    assert found.before == Size((4, 4), 4 * (48 + 96), 16 * (48 + 96))
    assert found.after == Size((1, 2), numbers, 4 * numbers)
    assert str(found).splitlines()[:2] == [
        "before  rank 4, 576 parameters, 2.2 KiB",
        "after   ranks 1 to 2, 192 parameters, 768 B",
    ]
    assert f"off by {found.error:.2%}" in str(found)
    record = found.adapter.provenance
    assert record is not None
    assert (record.how, record.parents[0].sha256) == ("compress", content_hash(adapter))
    assert record.settings == {"energy": 0.89, "error": found.error}
    lorary.save_adapter(found.adapter, tmp_path / "small")
    assert lorary.load_adapter(tmp_path / "small").provenance == record
    assert found.to_dict()["ranks"] == {"plain": 2, "conv": 1}


def test_a_rank_that_the_update_has_loses_nothing() -> None:
    adapter, y = trained("lora")
    found = lorary.compress(adapter, rank=64)
    assert {s.r for s in found.adapter.sites} == {4, 8}  # two projections of the fused weight are two products
    assert found.error < 1e-7
    torch.testing.assert_close(lorary.switch(base(), found.adapter)(X), y, rtol=1e-5, atol=1e-4)


def test_parameters_in_full_and_tied_sites_are_kept() -> None:
    adapter, _ = trained("lora", targets=["plain"], full=("conv.bias",))
    found = lorary.compress(adapter, rank=1)
    assert torch.equal(found.adapter.full["conv.bias"], adapter.full["conv.bias"])
    lorary.switch(base(), found.adapter)
    tied, _ = trained("lora", targets=["plain"])
    (site,) = tied.sites
    other = dataclasses.replace(site, site=dataclasses.replace(site.site, name="other"), share="both")
    sites = (dataclasses.replace(site, share="both"), other)
    tied = dataclasses.replace(tied, sites=sites, tensors=dict.fromkeys(("plain", "other"), tied.tensors["plain"]))
    small = lorary.compress(tied, rank=1)
    assert small.adapter.tensors["plain"]["A"] is small.adapter.tensors["other"]["A"]
    assert {s.share for s in small.adapter.sites} == {"both"}
    assert (small.before.parameters, small.after.parameters) == (4 * 48, 48)
    assert len(Spectra.of(tied).values) == 4


def test_sixteen_bits_stay_sixteen_bits_and_their_rounding_counts() -> None:
    adapter, _ = trained("lora", targets=["plain"])
    half = {name: {r: t.bfloat16() for r, t in roles.items()} for name, roles in adapter.tensors.items()}
    found = lorary.compress(dataclasses.replace(adapter, tensors=half), rank=4)
    tensors = found.adapter.tensors["plain"]
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    truth = dense(dataclasses.replace(adapter, tensors=half), "plain")
    off = float((tensors["B"].double() @ tensors["A"].double() - truth).norm() / truth.norm())
    assert found.error == pytest.approx(off, rel=1e-3)
    assert 1e-4 < found.error < 1e-2


def meta() -> lorary.Adapter:
    with torch.device("meta"):
        model = base()
        return lorary.Adapter.of(lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4), ["plain"])))


def incomplete() -> lorary.Adapter:
    adapter, _ = trained("lora", targets=["plain"])
    return dataclasses.replace(adapter, tensors={"plain": {"A": adapter.tensors["plain"]["A"]}})


def broken(value: float) -> lorary.Adapter:
    adapter, _ = trained("lora", targets=["plain"])
    return dataclasses.replace(adapter, tensors={"plain": {"A": torch.full((4, 24), value), "B": torch.ones(24, 4)}})


def zero() -> lorary.Adapter:
    adapter, _ = trained("lora", targets=["plain"])
    return dataclasses.replace(adapter, tensors={"plain": {"A": torch.ones(4, 24), "B": torch.zeros(24, 4)}})


def quantised_residual() -> lorary.Adapter:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "pissa", r=4), ["0"]))
    return lorary.Adapter.of(model)


def bare() -> lorary.Adapter:
    return lorary.Adapter.of(lorary.attach(base(), lorary.plan(base(), lorary.method("bitfit"))))


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: "out/adapter", {"rank": 2}, "adapter: is a str, not an Adapter"),
    (decaying, {}, "rank, energy or kl: one of them says how much to keep; given: none"),
    (decaying, {"rank": 2, "kl": 0.1}, "given: rank, kl"),
    (decaying, {"rank": 0}, "rank: is 0, not a whole number from 1 to 65,536"),
    (decaying, {"energy": 1.5}, "energy: is 1.5, not a share above 0 and at most 1"),
    (decaying, {"kl": math.nan}, "kl: is nan, not a finite number above 0"),
    (decaying, {"kl": 0.1}, "model: is a NoneType, not a torch.nn.Module, which kl needs"),
    (decaying, {"rank": 2, "rows": [[1]]}, "rows: is only read with kl"),
    (bare, {"rank": 2}, "adapter: adapts no layers, so it has no rank"),
    (lambda: broken(math.nan), {"rank": 2}, "96 of 96 values are NaN or infinite"),
    (meta, {"rank": 2}, "plain: A has no values: it is on the meta device"),
    (incomplete, {"rank": 2}, "plain: B is missing, expected (24, 4)"),
    (zero, {"rank": 2}, "adapter: its update is zero everywhere"),
    (
        lambda: trained("dora", targets=["plain"])[0],
        {"rank": 2},
        "plain: MagnitudeDirection(exact=False) gives the layer a gain or a shift of its own, so its update is not a "
        "product of factors\n      hint: lorary.change_rank keeps the method",
    ),
    (lambda: trained("glora", targets=["plain"])[0], {"rank": 2}, "gives the layer a gain or a shift of its own"),
    (quantised_residual, {"rank": 2}, "0: NF4 has quantised the base without the start of"),
]


@pytest.mark.parametrize(("make", "options", "sentence"), BAD, ids=[sentence[:40] for _, _, sentence in BAD])
def test_what_cannot_be_compressed_says_why(make: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LoraryError) as caught:
        lorary.compress(make(), **options)
    assert isinstance(caught.value, MethodError)
    assert sentence in str(caught.value)
    assert str(caught.value).count(sentence) == 1


def test_two_reasons_come_at_once() -> None:
    with pytest.raises(MethodError) as caught:
        lorary.compress(3, rank=2.5, model=base())  # type: ignore[arg-type]
    assert len(caught.value.problems) == 3


def values(adapter: lorary.Adapter) -> Tensor:
    return Spectra.of(adapter).values


def test_equal_singular_values_are_kept_together() -> None:
    adapter = decaying()
    spectra = Spectra.of(adapter)
    torch.testing.assert_close(values(adapter), torch.tensor([8, 4, 3, 2, 2, 1, 1, 0.5]).double(), rtol=1e-6, atol=0)
    sums = [sum(spectra.ranks_of_count(n).values()) for n in range(1, 9)]
    assert sums[:3] == [1, 2, 3]
    assert sums == sorted(sums)
    assert sums[-1] == 8
