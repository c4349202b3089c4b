"""Fidelity: what a merge loses, against the same figures computed in the plainest way, and what follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.merge_check import MergeCheck, logits
from lorary.analysis.merge_error import MergeError, SiteMergeError
from lorary.errors import StateError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.nf4 import NF4, NF4Linear
from tests import tiny

ROWS = tuple(tiny.ids())


def llama() -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    return tiny.llama()


def dense(layer: nn.Module) -> Tensor:
    """A packed weight in 64 bits, from bf16 as the layers of these models compute with it."""
    assert isinstance(layer, NF4Linear)
    return lorary.dequantize(nn.Sequential(layer)).get_submodule("0").weight.double()


def gaussian(ratio: float, folder: Path) -> nn.Sequential:
    """A Gaussian weight in NF4 with a LoRA of rank 16 whose update has `ratio` of its norm; saved, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    nn.init.normal_(model[0].weight, std=0.02)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=16, alpha=16), "0"))
    layer = adapted_layers(model)["0"]
    with torch.no_grad():
        B, A = torch.randn(512, 16), torch.randn(16, 512)
        layer.params["A"].copy_(A)
        layer.params["B"].copy_(B * (ratio * dense(layer.base).norm() / (B @ A).norm()))
    lorary.save(model, folder)
    return model


def plain() -> nn.Sequential:
    """The base of `gaussian`, before it was packed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    nn.init.normal_(model[0].weight, std=0.02)
    return model


# ||dW|| / ||W||: the error of a merge into Dq(Wq) in bf16, into the original weight, and of packing the first again,
# each relative to ||dW||. Another's measurement at 4096 x 4096; the ratios do not depend on the size.
TABLE = {0.002: (0.62, 46.0, 1.04), 0.01: (0.16, 9.2, 1.13), 0.03: (0.056, 3.1, 1.08), 0.1: (0.016, 0.92, 0.77)}


@pytest.mark.parametrize("ratio", TABLE)
def test_a_quantised_base_merges_into_16_bits_and_not_into_4(ratio: float, tmp_path: Path) -> None:
    rounded, original, repacked = TABLE[ratio]
    model = gaussian(ratio, tmp_path / "a")
    layer = adapted_layers(model)["0"]
    W = dense(layer.base)
    dW = layer.scale * layer.params["B"].detach().double() @ layer.params["A"].detach().double()
    live = MergeCheck.of(model)
    (site,) = live.sites(lorary.load(plain(), tmp_path / "a", quantize=False))
    found = live.merge(model)
    merged = model[0].weight.detach().double()
    assert found.sites[0].error == pytest.approx(float((merged - W - dW).norm() / dW.norm()), rel=1e-4)
    assert found.error == pytest.approx(rounded, rel=0.1)
    assert found.effect == pytest.approx(ratio, rel=1e-3)
    assert site.error == pytest.approx(original, rel=0.1)
    again = dense(NF4().quantize(model[0]))
    assert float((again - W - dW).norm() / dW.norm()) == pytest.approx(repacked, rel=0.1)


def test_float32_keeps_what_bfloat16_rounds_away(tmp_path: Path) -> None:
    found = MergeCheck.of(model := gaussian(0.002, tmp_path / "a")).merge(model, dtype=torch.float32)
    assert found.error < 1e-4
    assert found.advice == ()
    assert model[0].weight.dtype == torch.float32


# --- the figures, in the plainest way -------------------------------------------------------------------------------


def by_hand(layer: Adapted, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(W', W) [out, inp] in 64 bits, from the paper's formula; W is what the layer is without its adapter."""
    p = {role: t.detach().double() for role, t in layer.tensors.items()}
    held = dense(layer.base)
    if "vera" in names:
        return held + layer.scale * (p["b"][:, None] * p["B"]) @ (p["d"][:, None] * p["A"]), held
    update = layer.scale * p["B"] @ p["A"]
    W = held
    if "pissa" in names:
        W = held + layer.scale * layer.start["B0"].double() @ layer.start["A0"].double()
    if "dora" in names:
        V = held + update
        return p["m"][:, None] * V / V.norm(dim=1, keepdim=True), W
    return held + update, W


METHODS = [("qlora",), ("qlora", "rslora"), ("qlora", "dora"), ("qlora", "pissa"), ("qlora", "dora", "rslora", "pissa")]
METHODS += [("qlora", "vera")]


@pytest.mark.parametrize("names", METHODS, ids="+".join)
def test_the_figures_are_those_of_the_formulas(names: tuple[str, ...]) -> None:
    model = tiny.trained(llama().to(torch.bfloat16), lorary.method(*names, r=4))
    expected = {site: by_hand(layer, names) for site, layer in adapted_layers(model).items()}
    assert len(expected) == 14
    said = [logits(model, row).double() for row in ROWS]
    found = MergeCheck.of(model, ROWS).merge(model)
    for site in found.sites:
        exact, W = expected[site.site]
        kept = model.get_submodule(site.site).weight.detach()
        assert (site.dtype, kept.dtype) == ("bfloat16", torch.bfloat16)
        dW = (exact - W).norm()
        assert site.error == pytest.approx(float((kept.double() - exact).norm() / dW), rel=1e-3)
        assert site.effect == pytest.approx(float(dW / W.norm()), rel=1e-3)
    whole = [
        torch.cat([(e - W).flatten() for e, W in expected.values()]),
        torch.cat([W.flatten() for _, W in expected.values()]),
    ]
    assert found.effect == pytest.approx(float(whole[0].norm() / whole[1].norm()), rel=1e-3)
    p, q = torch.cat(said).softmax(-1), torch.cat([logits(model, row).double() for row in ROWS]).softmax(-1)
    assert found.tokens == len(p) == 10
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum() / len(p)), rel=1e-6, abs=1e-15)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.largest == pytest.approx(float((p.log() - q.log()).abs().max()), rel=1)  # up to the normalisers
    assert 0 < found.error < 0.1


@pytest.mark.parametrize("names", METHODS, ids="+".join)
def test_the_original_weights_are_held_against_the_packed_ones(names: tuple[str, ...], tmp_path: Path) -> None:
    model = tiny.trained(llama(), lorary.method(*names, r=4))
    lorary.save(model, tmp_path / "a")
    expected = {site: by_hand(layer, names) for site, layer in adapted_layers(model).items()}
    live = MergeCheck.of(model, ROWS)
    dense_ = lorary.load(llama(), tmp_path / "a", quantize=False)
    assert not [m for m in dense_.modules() if isinstance(m, NF4Linear)]
    found = live.merge(dense_)
    assert found.original
    for site in found.sites:
        exact, W = expected[site.site]
        kept = dense_.get_submodule(site.site).weight.detach().double()
        assert site.error == pytest.approx(float((kept - exact).norm() / (exact - W).norm()), rel=1e-4)
        assert site.effect == pytest.approx(float((exact - W).norm() / W.norm()), rel=1e-4)
    faithful = live.merge(model)
    assert found.error > 100 * faithful.error
    assert found.kl > 100 * faithful.kl


def test_a_plain_base_and_every_kind_of_layer_are_measured_alike() -> None:
    model = tiny.trained(tiny.ConvNet().to(torch.bfloat16), targets=["conv", "all-linear"])
    expected = {}
    for name, layer in adapted_layers(model).items():
        B, A = (t.detach().double() for t in layer.factors())
        expected[name] = (layer.scale * B @ A).norm()
    live = MergeCheck.of(model, [{"x": torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)}])
    found = live.merge(model)
    assert {s.site: s.change for s in found.sites} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-3
    )
    assert found.tokens == 2
    assert not found.original


def test_measuring_leaves_the_model_as_it_is() -> None:
    model = tiny.trained(llama().train(), lorary.method("qlora", r=2, dropout=0.5))
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    live = MergeCheck.of(model, ROWS)
    live.sites(model, torch.float16)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)


def test_a_merge_of_ones_own_is_measured_in_two_steps() -> None:
    model = tiny.trained(llama(), lorary.method("qlora", r=2))
    live = MergeCheck.of(model, ROWS)
    sites = live.sites(model)
    found = live.against(lorary.merge(model, keep=True), sites)
    lorary.unmerge(model)
    assert live.merge(model) == found


@pytest.mark.parametrize("names", [("lora",), ("qlora",)], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_another_precision_is_that_of_the_whole_model(names: tuple[str, ...], dtype: torch.dtype) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    model = tiny.trained(llama().to(other), lorary.method(*names, r=2))
    positions = model.model.rotary_emb.inv_freq
    found = MergeCheck.of(model, ROWS).merge(model, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    assert model.model.rotary_emb.inv_freq is positions
    assert found.tokens == 10
    assert {s.dtype for s in found.sites} == {str(dtype).removeprefix("torch.")}


# --- what is said of it ---------------------------------------------------------------------------------------------


def site(
    name: str = "a", error: float = 0.0, effect: float = 0.1, dtype: str = "bfloat16", **words: Any
) -> SiteMergeError:
    return SiteMergeError(name, error * effect, effect, 1.0, dtype, **words)


def test_the_report_prints_the_worst_first() -> None:
    sites = tuple(site(f"layers.{i}", error=i / 1000) for i in range(12))
    assert str(MergeError(sites, 400, 0.995, 1.4e-5, 0.03)) == (
        "site        ||dW|| / ||W||  error / ||dW||\n"
        + "".join(f"layers.{i}".ljust(12) + f"{'10.00%':>14}  {i / 10:>13.2f}%\n" for i in range(11, 1, -1))
        + "and 2 more\n"
        "together            10.00%           0.65%\n"
        "logits differ by at most 0.03, top-1 agrees at 99.5% of 400 tokens, KL 1.4e-05 nats per token"
    )


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([site(error=0.04), site(error=0.049)], ()),
        (
            [site("q", 0.16, 0.01), site("k", 0.02)],
            (
                "bfloat16 loses more than 5% of a small update at 1 of 2 sites: it is 1.00% of the weight at q, of "
                "which 16% is lost. To keep it, merge in float32 or keep the adapter beside its base",
            ),
        ),
        (
            [site("q", 0.06, 1e-6, "float32")],
            (
                "float32 loses more than 5% of a small update everywhere: it is 0.00% of the weight at q, of which 6% "
                "is lost. To keep it, keep the adapter beside its base",
            ),
        ),
        (
            [site("q", 3.1, 0.03, original=True)],
            (
                "the adapter was trained on quantised weights: undoing the quantisation error changes the weights by "
                "3.1 times as much as the adapter does. Often that is the better model, but it is another "
                "one: evaluate it",
            ),
        ),
        ([SiteMergeError("q", 0.1, 0.0, 1.0, "bfloat16")], ("the adapter changes no weight: is it the trained one?",)),
        ([SiteMergeError("q", 0.1, 0.0, 1.0, "bfloat16"), site("k")], ()),
        ([], ()),
    ],
)
def test_advice(sites: list[SiteMergeError], said: tuple[str, ...]) -> None:
    assert MergeError(tuple(sites)).advice == said


def test_what_is_not_finite_is_no_number_in_a_file() -> None:
    found = MergeError((SiteMergeError("q", 0.1, 0.0, 1.0, "bfloat16"),)).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["kl"], found["sites"][0]["error"], found["sites"][0]["effect"]) == (None, None, 0.0)
    assert "no effect" in str(MergeError((SiteMergeError("q", 0.1, 0.0, 1.0, "bfloat16"),)))
    assert "not compared" in str(MergeError(()))


def test_a_merged_model_that_answers_nan_is_told() -> None:
    model = tiny.trained(llama())
    live = MergeCheck.of(model, ROWS)
    lorary.merge(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    found = live.against(model)
    assert math.isnan(found.kl)
    assert math.isnan(found.largest)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    bare = llama()
    with pytest.raises(StateError, match="no adapter is attached"):
        MergeCheck.of(bare)
    model = tiny.trained(llama(), lorary.method("qlora", r=2), "q_proj")
    live = MergeCheck.of(model)
    with pytest.raises(StateError, match="no adapter is attached"):
        live.merge(bare)
    other = tiny.trained(llama(), lorary.method("qlora", r=2), "v_proj")
    with pytest.raises(StateError) as refusal:
        live.merge(other)
    assert str(refusal.value) == (
        "cannot measure:\n"
        + "\n".join(
            f"  - model.layers.{i}.self_attn.q_proj: is not adapted here\n"
            "      hint: merge the model that was measured, or the same adapter on its original base"
            for i in range(2)
        )
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_nothing_is_merged_into_a_few_bits(dtype: torch.dtype) -> None:
    model = tiny.trained(llama(), lorary.method("qlora", r=2))
    before = tiny.everything(model)
    with pytest.raises(StateError) as refusal:
        lorary.merge(model, dtype=dtype)
    assert str(refusal.value) == (
        f"cannot merge:\n  - dtype: is {dtype}: the steps between 4-bit or 8-bit numbers are coarser than what an "
        "adapter changes, and rounding would undo it\n      hint: use torch.bfloat16 or torch.float32"
    )
    assert tiny.everything(model) == before


def test_a_merged_packed_model_is_a_base_of_its_own() -> None:
    plain_ = lorary.Fingerprint.of(llama())
    model = tiny.trained(llama(), lorary.method("qlora", r=2))
    assert lorary.Fingerprint.of(model) == plain_
    lorary.dequantize(lorary.merge(model))
    assert lorary.Fingerprint.of(model).structure == plain_.structure
    assert lorary.Fingerprint.of(model).weights != plain_.weights


def test_a_small_update_of_a_large_quantised_weight_merges_into_either_base(tmp_path: Path) -> None:
    """The quantisation error is many times the update: both merges are offered, and each says what it loses.

    Merged into Dq(Wq) in float32 it is the model that was trained; merged into the original, that without the error.
    """

    def large() -> Any:
        model = llama()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "_proj" in name:
                    p.mul_(100)
        return model

    model = tiny.trained(large(), lorary.method("qlora", r=2))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.params["B"].mul_(0.003)
    lorary.save(model, tmp_path / "a")
    said = [logits(model, row) for row in ROWS]
    live = MergeCheck.of(model, ROWS)
    errors = {name: dense(layer.base) for name, layer in adapted_layers(model).items()}
    original = lorary.load(large(), tmp_path / "a", quantize=False)
    updates = {n: (x.scale * x.params["B"] @ x.params["A"]).detach() for n, x in adapted_layers(original).items()}
    plain = dict(large().named_parameters())
    into_original = live.merge(original)
    into_dequantised = live.merge(model, dtype=torch.float32)
    assert (into_original.original, into_dequantised.original) == (True, False)
    for site in into_original.sites:  # ||W - Dq(Wq)|| / ||dW||: tens of times the update
        off = plain[f"{site.site}.weight"].detach().double() - errors[site.site]
        assert site.error == pytest.approx(float(off.norm() / updates[site.site].norm()), rel=1e-3)
        assert site.error > 10
    assert "trained on quantised weights" in into_original.advice[0]
    assert into_dequantised.error < 1e-3
    assert into_dequantised.kl < 1e-6 < into_original.kl
    assert into_dequantised.advice == ()
    for row, before in zip(ROWS, said, strict=True):
        torch.testing.assert_close(logits(model, row), before, rtol=1e-3, atol=1e-3)
    for name, update in updates.items():
        expected = plain[f"{name}.weight"].detach() + update
        torch.testing.assert_close(original.get_submodule(name).weight, expected, rtol=1e-6, atol=1e-6)
