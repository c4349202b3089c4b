"""Merged weights give the same rows, only while all rows have the same adapters, and leave the base as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.serve.batch import merged
from lorary.serve.batch.batch import Batch, Weighted
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.batch.merged import steps_worth_merging, why_not_merged
from lorary.serve.batch.prepared import RowsError
from tests import tiny

from .test_layers import adapter_of, alone, close, seeded

PLENTY = 2**30


def served_of(base: Any, *adapters: Weighted, budget: int = PLENTY, after: int = 2) -> ServedLayers:
    served = ServedLayers(base, merged_budget=budget, merge_after=after)
    for weighted in adapters:
        for form, _ in weighted:
            served.cover(form)
    return served


def step(served: ServedLayers, base: Any, adapters: Sequence[Weighted], ids: Tensor) -> Tensor:
    rows = ids.shape[1]
    with served.computing(Batch.of([(weighted, rows, rows) for weighted in adapters])):
        found: Tensor = base(ids).logits
    return found


def held(served: ServedLayers) -> int:
    assert served.merged is not None
    return served.merged.bytes


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("preset", ["lora", "dora", "vera"])
def test_the_same_rows(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few layers at each step, from the third one on, until the base's products alone are left."""
    base = seeded(name)
    monkeypatch.setattr(merged, "_BYTES_PER_STEP", merged.spare_bytes(base) // 4)
    state = tiny.frozen_copy(base)
    adapter, form = adapter_of(copy.deepcopy(base), base, preset, r=5)
    served, ids = served_of(base, ((form, 1.0),)), torch.randint(40, (2, 3))
    wanted, sizes = None, []
    for _ in range(8):
        found = step(served, base, [((form, 1.0),)] * 2, ids)
        wanted = found if wanted is None else wanted
        close(found, wanted)
        sizes.append(held(served))
    assert sizes[:2] == [0, 0]
    assert 0 < sizes[2] < sizes[3]
    assert sizes == sorted(sizes)
    assert sizes[-1] == sizes[-2]
    assert tiny.same(base.state_dict(), state)
    with monkeypatch.context() as patch:
        patch.setattr("lorary.serve.batch.mixed._linear", None)  # nothing computes terms any more
        close(step(served, base, [((form, 1.0),)] * 2, ids), wanted)
    served.remove()
    assert held(served) == 0
    close(wanted, alone(base, adapter, ids))


def test_merging_waits_until_it_pays() -> None:
    """Small weights are merged soon; large ones are worth it only for many steps, few or many of them alike."""
    small, large = nn.Linear(192, 192), nn.Linear(4096, 4096)
    assert steps_worth_merging([small] * 100) == steps_worth_merging([]) == 8
    assert 100 < steps_worth_merging([large]) == steps_worth_merging([large] * 50) < 2000


def test_another_adapter_joins() -> None:
    """At once, and the first may have its weights again without merging them again."""
    base = seeded("LlamaForCausalLM")
    a, b = (adapter_of(copy.deepcopy(base), base, "lora", r=r, seed=r)[1] for r in (3, 4))
    one, other = ((a, 1.0),), ((b, 1.0),)
    served, ids = served_of(base, one, other), torch.randint(40, (2, 3))
    for _ in range(9):
        first = step(served, base, [one, one], ids)
    size = held(served)
    mixed = step(served, base, [one, other], ids)
    with_base = step(served, base, [one, ()], ids)
    close(mixed[0], first[0])
    close(with_base[0], first[0])
    assert torch.equal(with_base[1], base(ids).logits[1])
    assert held(served) == size
    close(mixed[1], step(served, base, [other, other], ids)[1])
    assert held(served) == 0
    for _ in range(9):
        close(step(served, base, [other, other], ids)[1], mixed[1])
    assert held(served) == size


def test_weighted_sums() -> None:
    base = seeded("LlamaForCausalLM")
    made = {name: adapter_of(copy.deepcopy(base), base, name, r=5) for name in ("lora", "vera")}
    weights = {"lora": 0.7, "vera": -0.4}
    several = tuple((made[name][1], weight) for name, weight in weights.items())
    served, ids = served_of(base, several), torch.randint(40, (2, 3))
    for _ in range(9):
        found = step(served, base, [several, several], ids)
    assert held(served)
    served.remove()
    adapters = {name: adapter for name, (adapter, _) in made.items()}
    close(found, alone(base, lorary.mix(adapters, weights=list(weights.values())), ids))


def test_what_does_not_fit_is_not_merged() -> None:
    base = seeded("LlamaForCausalLM")
    one = ((adapter_of(copy.deepcopy(base), base, "lora", r=3)[1], 1.0),)
    layers = [m for name, m in base.named_modules() if "proj" in name]
    needed = sum(p.numel() * 4 for layer in layers for p in layer.parameters())
    for budget, expected in ((needed - 1, 0), (needed, needed)):
        served = served_of(base, one, budget=budget)
        for _ in range(9):
            step(served, base, [one], torch.randint(40, (1, 3)))
        assert held(served) == expected
        served.remove()


def test_an_adapter_that_goes_takes_its_weights_along() -> None:
    base = seeded("LlamaForCausalLM")
    form = adapter_of(copy.deepcopy(base), base, "lora", r=3)[1]
    served = served_of(base, ((form, 1.0),))
    for _ in range(5):
        step(served, base, [((form, 1.0),)], torch.randint(40, (1, 3)))
    assert held(served)
    del form
    assert held(served) == 0


def test_parameters_of_its_own_are_not_merged() -> None:
    base = seeded("GPT2LMHeadModel")
    adapter, form = adapter_of(copy.deepcopy(base), base, "full", targets=None)
    served, ids = served_of(base, ((form, 1.0),)), torch.randint(40, (1, 3))
    for _ in range(9):
        found = step(served, base, [((form, 1.0),)], ids)
    assert held(served) == 0
    served.remove()
    close(found, alone(base, adapter, ids))


def test_rows_are_asked_for_all_the_same() -> None:
    base = seeded("LlamaForCausalLM")
    one = ((adapter_of(copy.deepcopy(base), base, "lora", r=3)[1], 1.0),)
    served = served_of(base, one)
    for _ in range(9):
        step(served, base, [one], torch.randint(40, (1, 3)))
    with (
        pytest.raises(RowsError, match="q_proj: the layer got 4 rows, and the batch has 3"),
        served.computing(Batch.of([(one, 3, 3)])),
    ):
        base(torch.randint(40, (1, 4)))


def test_why_a_layer_is_not_merged() -> None:
    base = seeded("LlamaForCausalLM")
    layer = base.model.layers[0].mlp.up_proj
    assert why_not_merged(layer) is None
    assert why_not_merged(base.model.embed_tokens) == "it is not a linear layer"
    assert "rounded to it" in str(why_not_merged(copy.deepcopy(layer).to(torch.bfloat16)))
    lorary.attach(base, lorary.plan(base, lorary.method("qlora", r=2), "all-linear"))
    lorary.detach(base)
    assert "is quantised" in str(why_not_merged(base.model.layers[0].mlp.up_proj))
    moved = copy.deepcopy(layer)
    moved.forward = moved.forward
    assert why_not_merged(moved) == "another library has replaced its forward"


FAULTS = {"gain": "dora", "shift": "dora", "d": "vera", "b": "vera", "A": "lora"}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = merged.merged_pair

    def wrong(layer: Any, sites: Any) -> Any:
        return right(layer, [(site._replace(**{fault: None}), weight) for site, weight in sites])

    monkeypatch.setattr(merged, "merged_pair", wrong)
    with pytest.raises(AssertionError):
        test_the_same_rows("GPT2LMHeadModel", FAULTS[fault], monkeypatch)
