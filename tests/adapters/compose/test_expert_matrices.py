"""Experts matrix by matrix: comparing, inspecting, compressing and changing the rank takes each expert by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.compose.merging import MERGINGS
from lorary.errors import LoraryError
from lorary.layers.adapted import adapted_layers
from tests.experts import logits, moe, shake

DOWN = "model.layers.0.mlp.experts.down_proj"
TARGETS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]


def one(e: int) -> str:
    """The name of one expert's matrix."""
    return f"model.layers.0.mlp.experts.{e}.down_proj"


def trained(*presets: str, base: str = "MixtralForCausalLM", seed: int = 1, size: float = 0.1, **options: Any) -> Any:
    model = moe(base)
    method = lorary.method(*(presets or ("lora",)), **({"r": 3} | options))
    lorary.attach(model, lorary.plan(model, method, targets=TARGETS), seed=seed)
    shake(model, size * seed)
    return model


def adapter(*presets: str, **options: Any) -> lorary.Adapter:
    return lorary.Adapter.of(trained(*presets, **options))


def update(a: lorary.Adapter, name: str = DOWN) -> Tensor:
    """[E, out, in] of the unmodified base."""
    form = a.low_rank()[name]
    return (form.B @ form.A).double()


def close(a: Tensor, b: Tensor, size: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=size, atol=size)


# --- diff -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presets", [("lora",), ("dora",), ("pissa",)])
def test_a_comparison_has_the_figures_of_each_expert(presets: tuple[str, ...]) -> None:
    a, b = adapter(*presets), adapter(seed=2)
    found = {s.site: s for s in lorary.diff(a, b).sites}
    assert len(found) == 2 * (1 + 4 + 4)
    dense = [update(x) if presets != ("dora",) else None for x in (a, b)]
    for e in range(4):
        s = found[one(e)]
        if dense[0] is None or dense[1] is None:
            continue
        A, B = dense[0][e], dense[1][e]
        assert s.a == pytest.approx(float(A.norm()), rel=1e-5)
        assert s.difference == pytest.approx(float((A - B).norm()), rel=1e-5)
        assert s.cosine == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())), abs=1e-5)
    assert lorary.diff(a, a).identical
    assert lorary.diff(a, a).relative == 0


def test_adapters_of_other_numbers_of_experts_have_other_sizes() -> None:
    found = lorary.diff(adapter(), other_count())
    assert found.other_shapes[DOWN] == "4 experts [16, 24] in A, 6 experts [16, 24] in B"
    assert not found.sites


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("presets", [("lora",), ("dora",)])
@pytest.mark.parametrize("base", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_an_inspection_has_the_spectrum_of_each_expert(base: str, presets: tuple[str, ...]) -> None:
    model = trained(*presets, base=base)
    found = {s.site: s for s in lorary.inspect_adapter(lorary.Adapter.of(model), moe(base)).sites}
    assert len(found) == 2 * (1 + 4 + 4)
    layer, plain = adapted_layers(model)[DOWN], moe(base).get_parameter(DOWN).detach()
    W = plain.mT if base.startswith("Gpt") else plain
    for e in range(4):
        delta = (layer.merged()[0][e] - W[e]).detach()
        mine = found[one(e)]
        assert mine.shape == tuple(W[e].shape)
        values = torch.linalg.svdvals(delta)
        assert mine.adapter.spectrum.values[0] == pytest.approx(float(values[0]), rel=1e-3)
        assert mine.adapter.weight == pytest.approx(float(W[e].norm()), rel=1e-5)


def test_a_tuned_model_and_quantised_experts_are_inspected_too() -> None:
    a, tuned = adapter(), moe()
    with torch.no_grad():
        tuned.get_parameter(DOWN)[2].add_(0.5)
    sites = {s.site: s for s in lorary.inspect_adapter(a, moe(), tuned=tuned, top=2).sites}
    by = [sites[one(e)].tuned.spectrum.values[0] for e in range(4)]
    assert [value > 1 for value in by] == [False, False, True, False]
    assert len(lorary.inspect_adapter(a, lorary.quantize(moe()), top=2).sites) == len(sites)


def test_experts_that_trained_in_full_are_inspected() -> None:
    model = moe()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), targets="q_proj", full=f"{DOWN}"))
    shake(model)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), moe(), top=0)
    assert [s.site for s in found.sites][-4:] == [one(e) for e in range(4)]
    assert not any("left out" in note and DOWN in note for note in found.notes)


# --- compress, and other ranks ----------------------------------------------------------------------------------------


def test_a_compressed_adapter_is_the_best_approximation_of_each_expert(tmp_path: Path) -> None:
    a = adapter()
    found = lorary.compress(a, rank=1)
    assert set(found.ranks.values()) == {1}
    for dense, cut in zip(update(a), update(found.adapter), strict=True):
        U, S, Vh = torch.linalg.svd(dense)
        close(cut, S[0] * U[:, :1] @ Vh[:1], 1e-4)
    lorary.save_adapter(found.adapter, tmp_path / "small")
    assert logits(lorary.load(moe(), tmp_path / "small")).isfinite().all()


def test_the_experts_of_a_block_keep_the_largest_rank_that_one_needs() -> None:
    model = trained(r=4)
    layer = adapted_layers(model)[DOWN]
    with torch.no_grad():
        for p in layer.params.values():
            p[1:] *= 1e-3  # one expert learned, the others hardly
        layer.params["B"][3] = 0.0  # and one nothing at all
    a = lorary.Adapter.of(model)
    found = lorary.compress(a, energy=0.999)
    assert found.ranks[DOWN] == 4
    assert found.error <= (1 - 0.999) ** 0.5
    close(update(found.adapter), update(a), 1e-4)
    assert found.errors[DOWN] < 1e-5


@pytest.mark.parametrize("base", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_a_higher_rank_leaves_the_function(base: str) -> None:
    model = trained(base=base)
    grown = lorary.change_rank(lorary.Adapter.of(model), 5)
    assert (grown.error, {s.r for s in grown.adapter.sites}) == (0.0, {5})
    assert grown.adapter.tensors[DOWN]["A"].shape[:2] == (4, 5)
    assert not torch.equal(grown.adapter.tensors[DOWN]["A"][0, 3:], grown.adapter.tensors[DOWN]["A"][1, 3:])
    close(logits(lorary.switch(moe(base), grown.adapter)), logits(model), 1e-4)


@pytest.mark.parametrize("presets", [("lora",), ("dora",), ("pissa",)])
def test_a_lower_rank_is_the_best_approximation_of_each_expert(presets: tuple[str, ...]) -> None:
    a = adapter(*presets)
    fallen = lorary.change_rank(a, 2)
    assert {s.r for s in fallen.adapter.sites} == {2}
    assert 0 < fallen.error < 1
    if presets == ("dora",):
        assert torch.equal(fallen.adapter.tensors[DOWN]["m"], a.tensors[DOWN]["m"])
        return
    for dense, cut in zip(update(a), update(fallen.adapter), strict=True):
        U, S, Vh = torch.linalg.svd(dense)
        close(cut, U[:, :2] * S[:2] @ Vh[:2], 1e-4)


# --- mix --------------------------------------------------------------------------------------------------------------


def best(M: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(M)
    return U[:, :r] * S[:r] @ Vh[:r]


def test_a_sum_of_a_lower_rank_is_the_best_of_each_expert() -> None:
    a, b = adapter(), adapter(seed=2)
    mixed = lorary.mix([a, b], [0.5, 2.0], rank=2)
    for e, found in enumerate(update(mixed)):
        close(found, best(0.5 * update(a)[e] + 2.0 * update(b)[e], 2), 1e-4)
    assert 0 < mixed.provenance.settings["errors"][DOWN] < 1
    kept = lorary.mix([a, b], energy=0.9999)
    close(update(kept), update(a) + update(b), 5e-2)


@pytest.mark.parametrize("how", ["ties", "magnitude", "slerp"])
def test_other_mixes_are_those_of_each_experts_matrix(how: str) -> None:
    a, b = adapter(), adapter(seed=2)
    found = update(lorary.mix([a, b], [0.5, 0.5], how=how))
    for e in range(4):
        pair = [update(x)[e].float() for x in (a, b)]
        dense = MERGINGS[how].dense(pair, [0.5, 0.5], 0.2, "") if how != "slerp" else on_the_arc(*pair)
        close(found[e].float(), best(dense, 6), 1e-3)


def on_the_arc(a: Tensor, b: Tensor) -> Tensor:
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return torch.sin(angle / 2) / torch.sin(angle) * (a + b)


def test_a_change_that_is_no_product_is_approximated_expert_by_expert() -> None:
    a, b = adapter("dora"), adapter(seed=2)
    mixed = lorary.mix([a, b], base=moe(), approximate=True, rank=16)
    dora, plain = trained("dora"), moe().get_parameter(DOWN).detach()
    expected = adapted_layers(dora)[DOWN].merged()[0] - plain + update(b)
    close(update(mixed), expected.double(), 1e-3)


# --- one adapter for all experts --------------------------------------------------------------------------------------


def together(seed: int = 1) -> lorary.Adapter:
    model = moe()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=3), targets=TARGETS, experts="shared"))
    shake(model, 0.1 * seed)
    return lorary.Adapter.of(model)


def test_one_adapter_of_all_experts_is_one_matrix() -> None:
    a, b = together(), together(2)
    (found,) = [s for s in lorary.diff(a, b).sites if s.site == DOWN]
    assert found.a == pytest.approx(float(update(a)[0].norm()), rel=1e-5)
    mixed = {s.site: s for s in lorary.diff(a, adapter()).sites}
    for e in range(4):
        assert mixed[one(e)].difference == pytest.approx(float((update(a)[e] - update(adapter())[e]).norm()), rel=1e-4)
    inspected = {s.site for s in lorary.inspect_adapter(a, moe(), top=0).sites}
    assert {one(e) for e in range(4)} <= inspected


def test_one_adapter_of_all_experts_stays_one() -> None:
    a = together()
    small = lorary.compress(a, rank=1).adapter
    fallen, grown = (lorary.change_rank(a, r).adapter for r in (1, 5))
    for changed, r in ((small, 1), (fallen, 1), (grown, 5)):
        assert changed.tensors[DOWN]["A"].shape == (r, 24)
        assert all(s.site.one_adapter for s in changed.sites if s.site.experts)
        for e in range(4):
            close(update(changed)[e], best(update(a)[e], r), 1e-4)
    close(logits(lorary.switch(moe(), grown)), logits(lorary.switch(moe(), a)), 1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


def spoiled(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> lorary.Adapter:
    a = adapter()
    tensors = {name: dict(roles) for name, roles in a.tensors.items()}
    tensors[DOWN] = change({role: t.clone() for role, t in tensors[DOWN].items()})
    return dataclasses.replace(a, tensors=tensors)


def with_nan(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    roles["B"][3, 0, 0] = torch.nan
    return roles


def other_count() -> lorary.Adapter:
    model = moe(num_local_experts=6)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=3), targets="experts.down_proj"))
    shake(model)
    return lorary.Adapter.of(model)


def fewer(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: t[:3] for role, t in roles.items()}


def without_a(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"B": roles["B"]}


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (
            lambda: lorary.diff(adapter(), spoiled(with_nan)),
            "1 of 192 values are NaN or infinite, the first at [3, 0, 0]",
        ),
        (
            lambda: lorary.compress(spoiled(with_nan), rank=1),
            "1 of 192 values are NaN or infinite, the first at [3, 0, 0]",
        ),
        (
            lambda: lorary.inspect_adapter(spoiled(with_nan)),
            "1 of 192 values are NaN or infinite, the first at [3, 0, 0]",
        ),
        (lambda: lorary.diff(adapter(), spoiled(fewer)), "is (3, 16, 3), expected (4, 16, 3)"),
        (lambda: lorary.compress(spoiled(fewer), rank=1), "is (3, 16, 3), expected (4, 16, 3)"),
        (lambda: lorary.compress(spoiled(without_a), rank=1), "experts.down_proj: A is missing, expected (4, 3, 24)"),
        (lambda: lorary.compress(adapter("dora"), rank=1), "gives the layer a gain or a shift of its own"),
        (lambda: lorary.change_rank(adapter("qlora", "pissa"), 2), "has quantised the base without the start of"),
        (lambda: lorary.change_rank(adapter("vera"), 2), "SharedProjectionDelta has no other rank"),
        (lambda: lorary.inspect_adapter(adapter(), moe(num_local_experts=6)), "has 6 experts, expected 4"),
        (lambda: lorary.inspect_adapter(adapter("dora")), "changes its weight by an amount that depends on the weight"),
        (lambda: lorary.mix([adapter(), spoiled(with_nan)], rank=2), "1 of 192 values are NaN or infinite"),
        (lambda: lorary.mix([adapter(), adapter("dora")], how="ties"), "gives its output a gain or a shift of its own"),
        (lambda: lorary.mix([adapter(), other_count()], how="ties"), "4 experts"),
    ],
)
def test_refusals(act: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(LoraryError) as error:
        act()
    assert sentence in str(error.value)
