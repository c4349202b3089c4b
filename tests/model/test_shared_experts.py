"""One adapter for all experts of a block: computed, trained, merged, saved, exported and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError, MethodError, PlanError
from lorary.layers.adapted import adapted_layers
from tests.experts import IDS, logits, moe, shake

peft = pytest.importorskip("peft")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("lora", "rslora", "lora+", "lora-fa", "vera", "melora")},
    "multilora": {"n": 2},
}


def planned(model: Any, name: str = "lora", targets: Any = EXPERTS, **options: Any) -> Any:
    return lorary.plan(model, lorary.method(name, r=2, **METHODS[name]), targets, experts="shared", **options)


def attached(base: str = "MixtralForCausalLM", name: str = "lora", **options: Any) -> Any:
    """A model with a trained adapter that its experts share."""
    model = moe(base)
    lorary.attach(model, planned(model, name, **options))
    shake(model, 0.05 if name == "vera" else 0.1)
    return model


def close(a: Tensor, b: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_the_plan_says_how_many_numbers_train() -> None:
    each, shared = (lorary.plan(moe(), lorary.method("lora", r=2), EXPERTS, experts=e) for e in ("each", "shared"))
    assert each.trainable == 4 * shared.trainable == 4 * 2 * 2 * (48 + 16 + 16 + 24)
    assert (
        "all 4 experts of model.layers.{0-1}.mlp.experts.gate_up_proj, model.layers.{0-1}.mlp.experts.down_proj share "
        f"one adapter: {shared.trainable:,} numbers in place of {each.trainable:,}"
    ) in shared.notes
    assert "experts, one adapter" in str(shared)
    assert "A[2x16]" in str(shared)
    assert "A[4x2x16]" in str(each)


@pytest.mark.parametrize("base", ["GptOssForCausalLM", "Llama4ForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("name", METHODS)
def test_a_shared_adapter_obeys_the_laws(name: str, base: str, tmp_path: Path) -> None:
    model = moe(base)
    before, plain = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    plan = planned(model, name)
    lorary.attach(model, plan)
    close(logits(model), plain)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trainable
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    shake(model, 0.05)
    live = logits(model)
    lorary.save(model, tmp_path / "a")
    assert torch.equal(logits(lorary.load(moe(base), tmp_path / "a")), live)
    lorary.merge(model, keep=True)
    close(logits(model), live)
    lorary.unmerge(model)
    lorary.detach(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_is_the_adapter_of_each_expert_with_one_value(dropout: float) -> None:
    """The same outputs as E equal adapters, and the sum of their gradients."""
    found = []
    for experts in ("shared", "each"):
        model = moe()
        method = lorary.method("lora", r=2, dropout=dropout)
        lorary.attach(model, lorary.plan(model, method, "experts.down_proj", experts=experts))
        torch.manual_seed(5)
        for layer in adapted_layers(model).values():
            layer.load({role: (torch.randn(p.shape[-2:]) * 0.3).expand(p.shape) for role, p in layer.params.items()})
        model.train()
        torch.manual_seed(6)
        out = model(input_ids=IDS).logits
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append((out.detach(), [g.sum(0) if g.dim() == 3 else g for g in grads]))
    (a, ga), (b, gb) = found
    close(a, b)
    for one, other in zip(ga, gb, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_half_of_a_fused_parameter_is_shared() -> None:
    model = attached("GptOssForCausalLM", targets="experts.gate_up_proj[gate]")
    live = logits(model)
    lorary.merge(model)
    close(logits(model), live)


def test_a_shared_adapter_resumes_exactly(tmp_path: Path) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def started() -> tuple[Any, torch.optim.Optimizer]:
        model = moe()
        lorary.attach(model, planned(model))
        return model, torch.optim.AdamW(lorary.param_groups(model, lr=1e-2, weight_decay=0.1))

    straight, optimizer = started()
    steps(straight, optimizer, 4)
    first, optimizer = started()
    steps(first, optimizer, 2)
    lorary.save(first, tmp_path / "a")
    second = lorary.load(moe(), tmp_path / "a", trainable=True)
    resumed = torch.optim.AdamW(lorary.param_groups(second, lr=1e-2, weight_decay=0.1))
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 2)
    assert torch.equal(logits(second), logits(straight))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("base", ["MixtralForCausalLM", "Llama4ForCausalLM"])
def test_peft_reads_it_once_for_every_expert(base: str, folded: bool, tmp_path: Path) -> None:
    model = attached(base, "rslora")
    live = logits(model)
    lorary.save(model, tmp_path / "own")
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    export_peft(lorary.load_adapter(tmp_path / "own"), tmp_path / "peft", model=moe(base), folded=folded)
    close(logits(peft.PeftModel.from_pretrained(moe(base), tmp_path / "peft")), live)
    again = lorary.load_adapter(tmp_path / "peft", model=moe(base))
    assert not any(p.site.one_adapter for p in again.sites)
    close(logits(lorary.switch(moe(base), again)), live)


def test_it_mixes_and_switches_with_adapters_of_each_expert() -> None:
    shared = lorary.Adapter.of(attached())
    model = moe()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=3), EXPERTS))
    shake(model)
    each = lorary.Adapter.of(model)
    both = lorary.mix([shared, each], [0.5, 2.0])
    assert not any(p.site.one_adapter for p in both.sites)
    truth = moe()
    with torch.no_grad():
        for adapter, weight in ((shared, 0.5), (each, 2.0)):
            for p in adapter.sites:
                B, A = p.factors(adapter.tensors[p.site.name])
                truth.get_parameter(p.site.name).add_(weight * p.scale * (B @ A))
    close(logits(lorary.switch(moe(), both)), logits(truth))


@pytest.mark.parametrize(
    ("name", "experts", "sentence"),
    [
        ("dora", "shared", "MagnitudeDirection depends on the matrix of each expert, which share one adapter"),
        ("pissa", "shared", "SVDInit starts at the matrix of each expert, which share one adapter"),
        ("olora", "shared", "starts at the matrix of each expert, which share one adapter"),
        ("lora", "share", "is 'share'; the experts of a block have an adapter `each`, or a `shared` one"),
        ("lora", 3, "is 3; the experts of a block have an adapter `each`, or a `shared` one"),
        ("lora", None, "is None; the experts of a block have an adapter `each`, or a `shared` one"),
    ],
)
def test_refused_in_a_plan(name: str, experts: Any, sentence: str) -> None:
    with pytest.raises(PlanError) as error:
        lorary.plan(moe(), lorary.method(name, r=2), EXPERTS, experts=experts)
    assert sentence in str(error.value)


def test_nothing_to_share_is_an_error() -> None:
    with pytest.raises(PlanError, match="is 'shared', and no adapted layer holds the matrices of experts"):
        lorary.plan(moe(), lorary.method("lora", r=2), "attention", experts="shared")
    with pytest.raises(MethodError, match="it belongs to the plan"):
        lorary.method("lora", experts="shared")


def test_a_preset_leaves_out_the_experts_that_cannot_share() -> None:
    with pytest.raises(PlanError, match="no adapted layer holds the matrices of experts"):
        lorary.plan(moe(), lorary.method("dora", r=2), experts="shared")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("one_adapter", "yes", "`one_adapter` is 'yes' at a site of kind experts"),
        ("one_adapter", False, "has the shape"),
        ("kind", "linear", "`experts` is 4 at a site of kind linear"),
    ],
)
def test_a_damaged_record_is_refused(field: str, value: Any, sentence: str, tmp_path: Path) -> None:
    lorary.save(attached(), tmp_path / "a")
    record = json.loads((tmp_path / "a" / "lorary.json").read_text())
    record["sites"][0][field] = value
    (tmp_path / "a" / "lorary.json").write_text(json.dumps(record))
    with pytest.raises(FileError) as error:
        lorary.load_adapter(tmp_path / "a", model=moe())
    assert sentence in str(error.value)


def test_the_tensors_of_another_sharing_are_refused() -> None:
    adapter = lorary.Adapter.of(attached())
    each = tuple(dataclasses.replace(p, site=p.site.whole) for p in adapter.sites)
    with pytest.raises(lorary.LoraryError, match=r"gate_up_proj: A is \(2, 16\), expected \(4, 2, 16\)"):
        lorary.switch(moe(), dataclasses.replace(adapter, sites=each))
