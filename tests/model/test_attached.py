"""lorary.attached: what is attached to a model, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from tests import tiny


def attach(names: Sequence[str] = ("lora",), targets: Any = "attention", model: Any = None, **options: Any) -> Any:
    model = model if model is not None else tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method(*names, **options), targets)
    return lorary.attach(model, plan), plan


def found(model: Any) -> lorary.Attachment:
    attachment = lorary.attached(model)
    assert attachment is not None
    return attachment


@pytest.mark.parametrize(
    "names", [("lora",), ("dora", "rslora"), ("vera",), ("pissa",), ("bitfit", "lora"), ("full",), ("adalora",)]
)
def test_it_says_what_the_plan_said(names: tuple[str, ...]) -> None:
    model, plan = attach(names, None if "full" in names else "attention", tiny.seeded("BertForSequenceClassification"))
    it = found(model)
    assert (it.method, it.sites) == (plan.method, plan.sites)
    assert (it.full, it.total) == (plan.full, plan.total)
    assert (it.trainable, it.share) == (plan.trainable, plan.share)
    assert it.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (it.merged, it.enabled) == (False, True)


def test_it_prints_as_the_plan_does() -> None:
    model, plan = attach(full="norm")
    lines, planned = str(found(model)).splitlines(), str(plan).splitlines()
    trains = next(i for i, line in enumerate(planned) if line.startswith("trains"))
    assert lines[: trains + 1] == planned[: trains + 1]
    base = lorary.Fingerprint.of(model)
    assert lines[trains + 1 :] == [f"base      LlamaForCausalLM {base.weights[:12]}", "state     attached"]


def test_it_says_whether_it_is_merged_or_disabled() -> None:
    model, _ = attach()
    before = found(model)
    with lorary.disabled(model):
        assert found(model) == dataclasses.replace(before, enabled=False)
        assert str(found(model)).endswith("state     attached, disabled")
    lorary.merge(model, keep=True)
    assert found(model) == dataclasses.replace(before, merged=True)
    assert str(found(model)).endswith("state     merged")
    lorary.unmerge(model)
    assert found(model) == before


def test_nothing_is_attached_to_a_plain_model() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    assert lorary.attached(model) is None
    assert lorary.attached(lorary.detach(attach(model=model)[0])) is None
    assert lorary.attached(lorary.merge(attach(model=model)[0])) is None


def test_nothing_can_be_attached_to_other_things() -> None:
    with pytest.raises(lorary.StateError, match="model: is a Plan, not a torch"):
        lorary.attached(attach()[1])  # type: ignore[arg-type]


def test_a_merge_that_adds_biases_leaves_the_size_of_the_base() -> None:
    model, plan = attach(("glora",), r=2)
    lorary.merge(model, keep=True)
    assert found(model).total == plan.total


def test_it_is_a_value_of_its_moment() -> None:
    model, _ = attach(r=2)
    before = found(model)
    lorary.detach(model)
    attach(model=model, r=4)
    assert {p.r for p in before.sites} == {2}
    assert {p.r for p in found(model).sites} == {4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.merged = True  # type: ignore[misc]


def test_the_base_is_the_one_before_anything_was_attached() -> None:
    base = lorary.Fingerprint.of(tiny.seeded("LlamaForCausalLM"))
    assert found(attach(("pissa",), r=4)[0]).base == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_layers_count_at_their_full_size(dtype: torch.dtype) -> None:
    model, plan = attach(("qlora",), model=tiny.seeded("LlamaForCausalLM").to(dtype), r=2)
    assert found(model).total == plan.total == sum(p.numel() for p in tiny.seeded("LlamaForCausalLM").parameters())


def test_a_loaded_adapter_counts_what_its_method_trains(tmp_path: Path) -> None:
    model, plan = attach()
    tiny.shaken(model)
    lorary.save(model, tmp_path)
    loaded = found(lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path))
    assert loaded.trainable == plan.trainable
    assert loaded == found(model)
