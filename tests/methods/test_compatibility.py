"""The table of combinations is true: what it allows trains, what it refuses is refused, and no preset is missing."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.methods.compatibility import partners, refusal, verdict
from tests import tiny

NAMES = list(lorary.presets())
PAIRS = list(itertools.combinations(NAMES, 2))
# for a rank and run so small, and a length that the model reads as it is
SHORT: dict[str, dict[str, Any]] = {
    "adalora": {"target": 2},
    "delta-lora": {"start": 1},
    "longlora": {"length": 64},
    "houlsby": {"m": 4},
    "alora": {"invocation": [5]},
    "rows": {"tokens": [3, 5]},
    "lora-ga": {"gamma": 4096.0},  # a start that is small beside such small weights
}
ALONE = {
    "houlsby",
    "ia3",
    "prefix-tuning",
    "prompt-tuning",
    "rows",
}  # their joins train without an update, and so without a rank


# Y: they go together. r: they do, with a restriction. N: refused.
# One letter for every preset further down the list, in its order.
TABLE = {
    "lora": "Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y N",
    "rslora": "Y Y Y Y N Y Y N r Y N N N N Y N Y Y Y Y Y Y Y N N N N N Y N",
    "lora+": "N Y r N r r N Y r r N N N Y r Y Y r r r Y Y N N N N N Y N",
    "lora-fa": "Y r N Y Y N Y Y r N N N Y N Y r Y Y Y Y Y N N N N N Y N",
    "qlora": "Y r r r Y Y Y Y Y Y Y Y Y Y Y Y r r Y Y Y Y Y Y Y r N",
    "dora": "N Y Y Y Y Y N Y Y Y N N N N Y Y Y Y Y N N N N N Y N",
    "glora": "N N N N N N N N N N N N N N N N N Y N N N N N N N",
    "pissa": "N N N N N N N N N N N N N N N N Y N N N N N Y N",
    "olora": "N N N N N N N N N N N N N N N Y N N N N N Y N",
    "vera": "N N N N N N Y N N N N N N N Y N N N N N Y N",
    "melora": "N N N N N Y N N N N N N N Y N N N N N Y N",
    "multilora": "N N N N Y N N N N N N N Y N N N N N Y N",
    "hira": "N N N N N N N N N N N Y N N N N N Y N",
    "miss": "N N Y N N N N N N N Y N N N N N Y N",
    "loha": "N Y N N N N N N N Y N N N N N Y N",
    "lokr": "Y N N N N N N N Y N N N N N Y N",
    "alora": "Y N N N N N Y N N N N N N r N",
    "adalora": "N N N N N N Y N N N N N Y N",
    "delta-lora": "N N N N N Y N N N N N Y N",
    "o-lora": "N N N N r N N N N N r N",
    "loftq": "N N N Y N N N N N Y N",
    "lora-ga": "N N Y N N N N N Y N",
    "corda": "N Y N N N N N Y N",
    "eva": "Y N N N N N Y N",
    "longlora": "Y Y Y N N Y N",
    "rows": "N N N N Y N",
    "houlsby": "N N N Y N",
    "ia3": "N N Y N",
    "prefix-tuning": "N Y N",
    "prompt-tuning": "Y N",
    "bitfit": "N",
    "full": "",
}


def test_every_verdict_is_as_expected() -> None:
    assert list(TABLE) == NAMES
    for i, (name, row) in enumerate(TABLE.items()):
        assert {other: verdict(name, other).letter for other in NAMES[i + 1 :]} == dict(
            zip(NAMES[i + 1 :], row.split(), strict=True)
        )
        assert list(partners(name)) == [other for other in NAMES if other != name]


def test_a_restriction_is_stated_by_the_later_preset() -> None:
    stated = {(other, name) for name in NAMES for other in lorary.presets()[name].restrictions}
    assert stated == {pair for pair in PAIRS if verdict(*pair).letter == "r"}


@pytest.mark.parametrize("pair", [p for p in PAIRS if verdict(*p).letter != "N"], ids="+".join)
def test_what_is_allowed_trains(pair: tuple[str, str]) -> None:
    adapts = any(lorary.presets()[name].adapts for name in pair)
    options = dict(verdict(*pair).options) | ({"r": 4} if adapts and not ALONE & set(pair) else {})
    for name in pair:
        options |= SHORT.get(name, {})
    if pair == ("qlora", "olora"):  # with s Q R there would be more left than there was
        options |= {"divide": True}
    method = lorary.method(*pair, **options)
    assert lorary.method(*reversed(pair), **options) == method
    model = tiny.seeded("GPT2LMHeadModel")  # it has biases, and its weights are transposed
    if "longlora" in pair:  # which needs rotary positions
        model = tiny.seeded("LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    plain = tiny.logits(model)
    plan = lorary.plan(model, method)
    base = tiny.logits(lorary.quantize(copy.deepcopy(model), method.storage)) if plan.quantized else plain
    lorary.attach(model, plan, data=tiny.data_for(plan))
    # what is left of a weight that gives up its start loses other numbers in packing than the weight does
    lost = (
        3 * (plain - base).abs().max().item() if plan.quantized and method.init and method.init.residual_init else 1e-5
    )
    lost = lost if method.join is None or method.join.exact_start else 1e-4  # a start near the base's function
    moved = method.context is not None and method.context.taken > 0  # what stands before the text is read at once
    assert torch.allclose(tiny.logits(model), base, rtol=1e-5, atol=lost) != moved
    model.train("longlora" in pair)  # GPT-2 drops in training, and a loss is to fall
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-3))
    rules = lorary.rules(model, 5, optimizer)
    losses = []
    for _ in range(5):
        loss = model(tiny.ids(), labels=tiny.ids()).loss
        (loss + rules.penalty()).backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert bool(adapted_layers(model)) == adapts


@pytest.mark.parametrize("pair", [p for p in PAIRS if verdict(*p).letter == "N"], ids="+".join)
def test_what_is_refused_says_why(pair: tuple[str, str]) -> None:
    with pytest.raises(lorary.errors.MethodError) as refused:
        lorary.method(*pair)
    with pytest.raises(lorary.errors.MethodError):
        lorary.method(*reversed(pair))
    why = verdict(*pair).why
    assert why
    assert all(part in str(refused.value) for part in why.split("; "))


def test_three_combine_where_each_pair_does() -> None:
    allowed = {pair for pair in PAIRS if verdict(*pair).letter != "N"}
    for three in itertools.combinations(NAMES, 3):
        if set(itertools.combinations(three, 2)) <= allowed:
            options = {k: v for pair in itertools.combinations(three, 2) for k, v in verdict(*pair).options.items()}
            assert refusal(*three, **options) == [], three


def test_what_has_to_be_said_makes_the_difference() -> None:
    said = {pair for pair in PAIRS if verdict(*pair).options}
    assert said == {("lora-fa", "o-lora"), ("qlora", "glora")}
    for pair in said:
        assert verdict(*pair).letter == "r"
        assert refusal(*pair) != []
        assert refusal(*pair, **verdict(*pair).options) == []


def test_a_verdict_is_the_same_in_either_order() -> None:
    for one, other in PAIRS:
        assert verdict(one, other) == verdict(other, one)


def test_refusal_of_what_is_possible_is_empty() -> None:
    assert refusal("rslora", "dora", "pissa", "lora+") == []
    assert refusal("vera", "melora") == [
        "vera and melora both choose what is trained: SharedProjectionDelta and BlockDiagonal"
    ]
