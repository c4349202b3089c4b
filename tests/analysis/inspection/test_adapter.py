"""inspect_adapter: the figures are those of the merged weights, for every method, with and without the base."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.inspection.figures import HEAD, AdapterInspection
from lorary.layers.adapted import adapted_layers
from lorary.spec.interfaces import has_rank
from tests import tiny

OPTIONS: dict[str, dict[str, Any]] = {"adalora": {"target": 2}, "longlora": {"length": 64}, "vera": {"r": 8}}
METHODS = [
    name for name in lorary.presets() if has_rank(lorary.method(name).delta) and name not in ("qlora", "loftq", "alora")
]


def pair(name: str = "lora", targets: Any = "all-linear", kind: str = "LlamaForCausalLM") -> tuple[Any, Any]:
    """A base, and a copy of it with a trained adapter."""
    base = tiny.seeded(kind)
    method = lorary.method(name, **{"r": 2} | OPTIONS.get(name, {}))
    return base, tiny.trained(copy.deepcopy(base), method, targets)


def matrix(layer: Any, model: Any) -> Tensor:
    W: Tensor = layer.kind.matrix(model.get_submodule(layer.site.name)).detach()
    return W


@pytest.mark.parametrize("name", METHODS)
def test_the_change_is_that_of_the_merged_weight(name: str) -> None:
    base, model = pair(name)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base)
    layers = adapted_layers(model)
    assert [s.site for s in found.sites][: len(layers)] == list(layers)
    for site in found.sites[: len(layers)]:
        W, merged = matrix(layers[site.site], base), layers[site.site].merged()[0]
        figures = site.adapter
        assert figures.spectrum.norm == pytest.approx(float((merged - W).detach().norm()), rel=1e-4)
        assert figures.spectrum.values[0] == pytest.approx(float(torch.linalg.matrix_norm(merged - W, 2)), rel=1e-4)
        assert figures.effect == pytest.approx(figures.spectrum.norm / float(W.norm()), rel=1e-6)
        assert site.shape == tuple(W.shape)
        assert figures.intruders is not None
        changed = float((merged != W).double().mean())  # half of them with MELoRA's two blocks
        assert figures.altered == pytest.approx(changed, abs=0.01)
    again = lorary.inspect_adapter(lorary.Adapter.of(model), model)
    assert again.to_dict() == found.to_dict(), "the base may have the adapter attached"


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("GPT2LMHeadModel", ["attention-qv", "embedding"]),
        ("MobileNetV2ForImageClassification", ["conv"]),
        ("BertForSequenceClassification", ["attention"]),
    ],
)
def test_every_layer_kind(kind: str, targets: list[str]) -> None:
    base, model = pair("lora", targets, kind)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base, top=3)
    layers = adapted_layers(model)
    for site in (s for s in found.sites if s.site in layers):
        change = layers[site.site].merged()[0] - matrix(layers[site.site], base)
        assert site.adapter.spectrum.norm == pytest.approx(float(change.detach().norm()), rel=1e-4)
        assert site.shape == tuple(change.shape)
        assert site.rank == min(2, *change.shape) * (2 if site.site.endswith("c_attn") else 1)


def test_a_quantised_base_is_measured_as_its_adapter_sees_it() -> None:
    model = tiny.seeded("LlamaForCausalLM", hidden_size=64, intermediate_size=64)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2)))
    tiny.shaken(model)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), model)
    layer = adapted_layers(model)[found.sites[0].site]
    assert found.sites[0].adapter.weight == pytest.approx(float(layer.matrix.float().norm()), rel=1e-5)


def test_full_fine_tuning_is_inspected_too() -> None:
    base = tiny.seeded("LlamaForCausalLM")
    model = copy.deepcopy(base)
    lorary.attach(model, lorary.plan(model, lorary.method("full")))
    tiny.shaken(model)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base)
    names = [s.site for s in found.sites]
    assert "model.embed_tokens" in names
    assert len(names) == 2 * 7 + 2
    by_name = {s.site: s for s in found.sites}
    change = model.lm_head.weight - base.lm_head.weight
    assert by_name["lm_head"].adapter.spectrum.norm == pytest.approx(float(change.detach().norm()), rel=1e-5)
    assert found.notes == (
        "5 parameters trained in full are left out, such as model.layers.0.input_layernorm.weight: "
        "they are not weight matrices",
    )


def test_without_the_base_the_spectra_remain() -> None:
    base, model = pair()
    adapter = lorary.Adapter.of(model)
    found, whole = lorary.inspect_adapter(adapter), lorary.inspect_adapter(adapter, base)
    assert [s.adapter.spectrum for s in found.sites] == [s.adapter.spectrum for s in whole.sites]
    figures = found.sites[0].adapter
    assert (figures.weight, figures.effect, figures.intruders, figures.rows, figures.altered) == (None,) * 5
    assert (found.effect(), found.intruders(), found.correlation()) == (None, None, None)
    assert found.notes == (
        "left out, because they need the base: the size beside the weights, intruder dimensions, and magnitude and "
        "direction",
    )


def test_intruders_may_be_spared() -> None:
    base, model = pair()
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base, top=0)
    assert found.intruders() is None
    assert found.notes == ("intruder dimensions are left out: top is 0",)
    assert found.correlation() is None, "two layers of a kind have no correlation"
    assert found.effect()


def test_an_untrained_adapter_changes_nothing() -> None:
    base = tiny.seeded("LlamaForCausalLM")
    model = copy.deepcopy(base)
    lorary.attach(model, lorary.plan(model, tiny.LORA))
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base)
    assert (found.effect(), found.stable_rank(), found.intruders()) == (0, 0, (0, 0))
    assert all(s.adapter.altered == 0 and s.adapter.rows == (0, 0) for s in found.sites)


class OneLayer(nn.Module):
    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.layer.weight.data = W

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def test_a_planted_direction_is_one_intruder_of_the_adapter() -> None:
    """B is orthogonal to the columns of W and its length is above the tenth singular value."""
    U, _, V = torch.linalg.svd(torch.randn(32, 14, generator=torch.Generator().manual_seed(0)))
    W = U[:, :14] * (16.0 - torch.arange(14)) @ V
    model: Any = OneLayer(W)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=1, alpha=1), ["layer"]))
    with torch.no_grad():
        model.layer.params["A"].copy_(V[13:])
        model.layer.params["B"].copy_(9 * U[:, 20:21])
    (site,) = lorary.inspect_adapter(lorary.Adapter.of(model), model).sites
    assert site.adapter.intruders is not None
    assert (site.adapter.intruders.count, site.adapter.intruders.count_right) == (1, 0)
    assert site.adapter.spectrum.values == (pytest.approx(9.0),)
    assert site.adapter.spectrum.stable_rank == pytest.approx(1)


def test_beside_a_tuned_model_the_bound_holds() -> None:
    base, model = pair()
    tuned = tiny.shaken(copy.deepcopy(base), 0.05)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base, tuned=tuned)
    assert found.compares
    for s in found.sites:
        W, T = (m.get_submodule(s.site).weight.detach() for m in (base, tuned))
        A = adapted_layers(model)[s.site].merged()[0]
        assert s.error == pytest.approx(float((T - A).norm() / (T - W).norm()), rel=1e-4)
        assert s.least_error is not None
        assert s.error is not None
        assert s.least_error <= s.error
    best = lorary.inspect_adapter(lorary.Adapter.of(model), base, tuned=model)
    assert all(s.error == pytest.approx(0, abs=1e-5) for s in best.sites), "an attached adapter is read as merged"


def test_numbers_that_rounding_would_swallow_are_not_altered() -> None:
    base, model = pair()
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.params["B"].mul_(1e-6)
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base, dtype=torch.bfloat16)
    assert all((s.adapter.altered or 0) < 0.2 for s in found.sites)


def test_it_prints_the_largest_changes_first_and_writes_json() -> None:
    base, model = pair()
    found = lorary.inspect_adapter(lorary.Adapter.of(model), base, tuned=base)
    lines = str(found).splitlines()
    assert all(word in lines[0] for word in HEAD)
    sizes = [s.adapter.effect or 0 for s in found.sites]
    assert f"{max(sizes):.2%}" in lines[1]
    assert lines[-2].startswith("adapter: ‖ΔW‖/‖W‖ ")
    assert lines[-1].startswith("tuned model: ‖ΔW‖/‖W‖ 0.00%")
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["sites"][0]["tuned"]["effect"] == 0
    assert record["sites"][0]["error"] is None, "relative to no change it is infinite"
    assert len(found.rows(3)) == 4
    assert found.rows(3)[-1][0] == "and 11 more"


def bad(adapter: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.inspect_adapter(adapter, *arguments, **options)
    return str(caught.value)


def test_every_wrong_argument_is_told_at_once() -> None:
    told = bad("folder", 3, tuned="x", top=-1, epsilon=float("nan"))
    assert told == (
        "cannot inspect this adapter:\n"
        "  - adapter: is a str, not an Adapter\n"
        "  - base: is a int, not a torch.nn.Module\n"
        "  - tuned: is a str, not a torch.nn.Module\n"
        "  - top: is -1, not a whole number from 0 on\n"
        "  - epsilon: is nan, not a cosine above 0 and at most 1"
    )
    base, model = pair()
    adapter = lorary.Adapter.of(model)
    assert "tuned: cannot be compared without the base that it was tuned from" in bad(adapter, tuned=base)
    assert "top: is True, not a whole number from 0 on" in bad(adapter, base, top=True)
    assert "epsilon: is 1.5, not a cosine above 0 and at most 1" in bad(adapter, base, epsilon=1.5)


def test_models_that_do_not_fit_are_refused() -> None:
    base, model = pair()
    adapter = lorary.Adapter.of(model)
    wider = tiny.seeded("LlamaForCausalLM", intermediate_size=32)
    assert "model.layers.0.mlp.gate_proj and 3 more: has 32 output features, expected 24" in bad(adapter, wider), (
        "of the base"
    )
    assert "the tuned model's model.layers.0.mlp.gate_proj" in bad(adapter, base, tuned=wider)
    shorter = tiny.seeded("LlamaForCausalLM", num_hidden_layers=1)
    assert "model.layers.1.self_attn.q_proj and 6 more: the model has no such module" in bad(adapter, shorter)
    assert "model: is on the meta device and has no values" in bad(adapter, tiny.model("LlamaForCausalLM", "meta"))
    lorary.merge(model, keep=True)
    assert "base: has an adapter merged into its weights" in bad(adapter, model)


def test_numbers_that_are_not_finite_are_refused() -> None:
    base, model = pair()
    adapter = lorary.Adapter.of(model)
    broken = copy.deepcopy(base)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    told = "model.layers.1.mlp.up_proj: 1 of 384 numbers of {} weight are NaN or infinite"
    assert told.format("the base's") in bad(adapter, broken)
    assert told.format("the tuned model's") in bad(adapter, base, tuned=broken)
    name = "model.layers.0.self_attn.q_proj"
    roles = {**adapter.tensors[name], "B": torch.full_like(adapter.tensors[name]["B"], float("inf"))}
    spoilt = dataclasses.replace(adapter, tensors={**adapter.tensors, name: roles})
    count = roles["B"].numel()
    assert f"'{name}: B': {count} of {count} values are NaN or infinite, the first at [0, 0]" in bad(spoilt)
    empty = tiny.model("LlamaForCausalLM", "meta")
    lorary.attach(empty, lorary.plan(empty, tiny.LORA))
    told = bad(lorary.Adapter.of(empty))
    assert "A has no values: it is on the meta device" in told


def test_what_needs_the_base_says_so() -> None:
    _, model = pair("dora")
    told = bad(lorary.Adapter.of(model))
    assert "model.layers.0.self_attn.q_proj and 13 more: MagnitudeDirection changes its weight by an amount" in told
    assert "hint: give the base" in told


def test_an_adapter_of_no_matrix_is_refused() -> None:
    base = tiny.seeded("GPT2LMHeadModel")
    model = copy.deepcopy(base)
    lorary.attach(model, lorary.plan(model, lorary.method("bitfit")))
    adapter = lorary.Adapter.of(model)
    assert "adapter: changes no weight matrix" in bad(adapter, base)
    assert "give the base: it trained parameters in full" in bad(adapter)


def test_the_inspection_is_a_value() -> None:
    base, model = pair()
    adapter = lorary.Adapter.of(model)
    before = tiny.everything(base)
    found = lorary.inspect_adapter(adapter, base)
    assert isinstance(found, AdapterInspection)
    assert before[0] == tiny.everything(base)[0]
    assert found == lorary.inspect_adapter(adapter, base)
