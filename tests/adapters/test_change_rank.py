"""A trained adapter at another rank: up nothing changes, down it is the best approximation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import MethodError
from lorary.layers.adapted import adapted_layers
from lorary.model.rank_pruning import directions_of
from tests.laws.cases import made_of, seed


class Net(nn.Module):
    """A layer of each form that a rank has: plain, fused, embedded, convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.plain = nn.Embedding(30, 24), nn.Linear(24, 24)
        self.c_attn, self.conv = Conv1D(72, 24), nn.Conv1d(24, 24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.plain(self.embed(x))).chunk(3, -1)
        y: Tensor = self.conv((q * k + v).mT)
        return y


def base() -> Net:
    seed(1)
    return Net()


def trained(*names: str, targets: Any = None, **options: Any) -> tuple[lorary.Adapter, Tensor]:
    """An adapter of rank 4 after some training, and the output of the model with it."""
    targets = targets or ["embed", "plain", "c_attn[q,v]", "conv"]
    model = lorary.attach(base(), lorary.plan(base(), made_of(*names, r=4, **options), targets))
    seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.3)
    return lorary.Adapter.of(model), model.eval()(X).detach()


X = torch.arange(14).reshape(2, 7)
LINEAR = ["plain", "c_attn[q,v]"]
GROWING: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lora": (("lora",), {}),
    "rslora": (("rslora",), {}),
    "dora": (("dora",), {}),
    "lora-fa": (("lora-fa",), {"targets": LINEAR}),
    "lora+": (("lora+",), {}),
    "pissa": (("pissa",), {}),
    "olora": (("olora",), {}),
    "adalora": (("adalora",), {"targets": ["plain"]}),
    "melora": (("melora",), {"targets": ["plain", "c_attn[q,v]"]}),
    "multilora": (("multilora",), {}),
    "delta-lora": (("delta-lora",), {}),
    "delta-lora at once": (("delta-lora",), {"start": -1}),
    "o-lora": (("o-lora",), {"targets": LINEAR}),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_higher_rank_leaves_the_function_and_can_train(name: str) -> None:
    names, options = GROWING[name]
    adapter, y = trained(*names, **options)
    change = lorary.change_rank(adapter, 6)
    assert (change.error, set(change.errors.values())) == (0.0, {0.0})
    assert {s.r for s in change.adapter.sites} == {6}
    model = lorary.switch(base(), change.adapter)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=2e-6 * float(y.abs().max()))
    for name in adapter.tensors:  # in 64 bits: to the rounding of s
        torch.testing.assert_close(dense(change.adapter, name), dense(adapter, name), rtol=1e-12, atol=1e-12)
    for old, new in zip(adapter.sites, change.adapter.sites, strict=True):
        assert new.scale == pytest.approx(old.scale, rel=1e-12)
    # every new direction can learn: of its two factors one is zero, and the other is not
    for s in change.adapter.sites:
        tensors = change.adapter.tensors[s.site.name]
        for role, dim in {"A": 0, "B": 1, "P": 1, "Q": 0}.items():
            if role in tensors:
                assert tensors[role].shape[dim] % 6 == 0
    model.requires_grad_(True)
    model(X).square().sum().backward()
    for layer in adapted_layers(model).values():
        grad = layer.params["E"].grad if "E" in layer.params else layer.params["B"].grad
        own = grad if layer.site.kind != "embedding" else layer.params["A"].grad
        assert own is not None
        rank = own.unflatten(-1, (-1, 6)) if own.dim() == 1 or layer.site.kind != "embedding" else own.T
        assert bool(rank[..., 4:].any()), layer.site.name


def dense(adapter: lorary.Adapter, name: str) -> Tensor:
    """dW of a site, in 64 bits."""
    s = next(s for s in adapter.sites if s.site.name == name)
    tensors = {role: t.double() for role, t in adapter.tensors[name].items()}
    B, A = s.delta.factors(s.site, tensors)
    W = B @ A
    if s.starts:
        B0, A0 = s.delta.factors(s.site, {role: tensors[f"{role}0"] for role in s.starts})
        W = W - B0 @ A0
    return s.scale * W


SHRINKING = {k: v for k, v in GROWING.items() if k not in ("melora", "multilora", "delta-lora")}


@pytest.mark.parametrize("name", SHRINKING)
def test_a_lower_rank_is_the_truncated_svd_of_the_update(name: str) -> None:
    names, options = GROWING[name]
    adapter, _ = trained(*names, **options)
    change = lorary.change_rank(adapter, 2)
    lost = total = 0.0
    for s in change.adapter.sites:
        before, after = dense(adapter, s.site.name), dense(change.adapter, s.site.name)
        gap = 0.0
        for whole, found in zip(s.site.split(before), s.site.split(after), strict=True):
            U, S, V = torch.linalg.svd(whole, full_matrices=False)
            torch.testing.assert_close(found, U[:, :2] * S[:2] @ V[:2], rtol=1e-4, atol=1e-5 * float(S[0]))
            gap += float(S[2:].square().sum())
        assert change.errors[s.site.name] == pytest.approx((gap**0.5) / float(before.norm()), rel=1e-5)
        assert change.errors[s.site.name] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        lost, total = lost + gap, total + float(before.norm()) ** 2
    assert change.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert f"{change.error:.2%}" in str(change)
    model = lorary.switch(base(), change.adapter)
    assert bool(model(X).isfinite().all())


def test_each_block_of_melora_is_truncated_for_itself() -> None:
    adapter, _ = trained("melora", targets=["plain"])
    change = lorary.change_rank(adapter, 2)
    before, after = dense(adapter, "plain"), dense(change.adapter, "plain")
    for rows in (slice(0, 12), slice(12, 24)):
        U, S, V = torch.linalg.svd(before[rows, rows], full_matrices=False)
        torch.testing.assert_close(after[rows, rows], U[:, :2] * S[:2] @ V[:2], rtol=1e-4, atol=1e-5)


def test_down_to_a_rank_that_the_update_has_loses_nothing() -> None:
    adapter, y = trained("lora")
    again = lorary.change_rank(lorary.change_rank(adapter, 9).adapter, 4)
    assert again.error < 1e-7
    torch.testing.assert_close(lorary.switch(base(), again.adapter)(X), y, rtol=1e-5, atol=1e-5)
    same = lorary.change_rank(adapter, 4).adapter
    assert all(t is adapter.tensors[n][role] for n, roles in same.tensors.items() for role, t in roles.items())
    assert same.method == adapter.method


def test_powers_of_two_are_exact_to_the_bit() -> None:
    adapter, y = trained("lora", alpha=8.0)
    assert torch.equal(lorary.switch(base(), adapter)(X), y)
    change = lorary.change_rank(adapter, 8)
    for name, before in ((s.site.name, dense(adapter, s.site.name)) for s in adapter.sites):
        assert torch.equal(dense(change.adapter, name), before)
    assert change.adapter.method.scale.alpha == 16.0  # type: ignore[union-attr]


def test_a_pruned_adalora_gets_one_rank_everywhere() -> None:
    adapter, _ = trained("adalora", targets=["plain", "conv"])
    adapter.tensors["plain"]["E"][1:] = 0
    small = adapter.compact()
    assert {s.site.name: directions_of(s) for s in small.sites} == {"plain": 1, "conv": 4}
    change = lorary.change_rank(small, 3)
    assert {directions_of(s) for s in change.adapter.sites} == {3}
    assert change.errors["plain"] == 0 < change.errors["conv"]
    torch.testing.assert_close(dense(change.adapter, "plain"), dense(small, "plain"))


def test_an_adapter_of_another_rank_is_saved_and_tied_layers_stay_tied(tmp_path: Any) -> None:
    adapter, _ = trained("lora", targets=LINEAR)
    change = lorary.change_rank(adapter, 7)
    lorary.save_adapter(change.adapter, tmp_path / "seven")
    again = lorary.load_adapter(tmp_path / "seven")
    assert {s.r for s in again.sites} == {7}
    torch.testing.assert_close(lorary.switch(base(), again)(X), lorary.switch(base(), adapter)(X), rtol=1e-6, atol=2e-6)


REFUSED: list[tuple[Any, Any, str]] = [
    ("lora", 0, "r: is 0; a rank is a whole number from 1 to 65,536"),
    ("lora", 2.5, "r: is 2.5"),
    ("lora", True, "r: is True"),
    ("vera", 6, "delta: SharedProjectionDelta has no other rank"),
    ("glora", 6, "delta: GLoRADelta has no other rank"),
    ("loha", 6, "delta: LowRankHadamard has no other rank"),
    ("lokr", 6, "delta: KroneckerProduct has no other rank"),
    ("multilora", 2, "delta: ParallelLowRank is more than one product"),
    ("delta-lora", 2, "delta: DeltaLoRADelta is more than one product"),
]


@pytest.mark.parametrize(("name", "r", "sentence"), REFUSED, ids=[f"{n} {r}" for n, r, _ in REFUSED])
def test_what_has_no_such_rank_is_refused(name: str, r: Any, sentence: str) -> None:
    adapter, _ = trained(name, targets=["plain"])
    with pytest.raises(MethodError) as caught:
        lorary.change_rank(adapter, r)
    assert sentence in str(caught.value)
    assert str(caught.value).count(sentence) == 1


def test_a_quantised_residual_keeps_its_rank_or_grows() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", "pissa", r=4), ["0"]))
    adapter = lorary.Adapter.of(model)
    assert lorary.change_rank(adapter, 8).error == 0
    with pytest.raises(MethodError, match="NF4 has quantised the base without the start"):
        lorary.change_rank(adapter, 2)
    with pytest.raises(MethodError, match="is a str, not an Adapter"):
        lorary.change_rank("out/adapter", 2)  # type: ignore[arg-type]
    bare = lorary.attach(base(), lorary.plan(base(), lorary.method("bitfit")))
    with pytest.raises(MethodError, match="adapts no layers"):
        lorary.change_rank(lorary.Adapter.of(bare), 2)
