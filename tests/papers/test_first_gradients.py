"""The first backward pass of every method: which tensors the task's loss reaches at the start, and which a penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.spec.interfaces import has_rank
from tests import tiny

LORA = {"A": "zero", "B": "some"}
TABLE: dict[str, dict[str, str]] = {
    "lora": LORA,
    "rslora": LORA,
    "lora+": LORA,
    "qlora": LORA,
    "longlora": LORA,
    "melora": LORA,
    "o-lora": LORA,
    "lora-fa": {"A": "none", "B": "some"},
    "dora": LORA | {"m": "some"},
    "delta-lora": LORA | {"A_K": "none", "B_K": "none", "lam": "none"},
    "pissa": {"A": "some", "B": "some"},
    "olora": {"A": "some", "B": "some"},
    "loftq": {"A": "some", "B": "some"},
    "lora-ga": {"A": "some", "B": "some"},
    "corda": {"A": "some", "B": "some"},
    "eva": LORA,
    "vera": {"b": "some", "d": "zero"},
    "alora": LORA,
    "multilora": {"A": "zero", "B": "zero", "gamma": "some"},
    "loha": {"A1": "zero", "B1": "zero", "A2": "zero", "B2": "some"},
    "lokr": {"C": "zero", "Da": "some", "Db": "zero"},
    "adalora": {"P": "zero", "E": "some", "Q": "zero"},
    "glora": {"Ad": "some", "Au": "zero", "Bd": "some", "Bu": "zero", "Cd": "some", "Cu": "zero", "E": "some"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alora": {"invocation": (5,)},
    "adalora": {"target": 2},
    "longlora": {"length": 64},
    "vera": {"r": 8},
    "lokr": {"r": 1},  # from half of its larger side on, D is one matrix
    "eva": {"rho": 1.0},  # every layer keeps its rank
}


def attached(name: str, targets: Any = "all-linear") -> Any:
    model = tiny.seeded("LlamaForCausalLM")
    method = lorary.method(name, **{"r": 4} | OPTIONS.get(name, {}))
    plan = lorary.plan(model, method, targets)
    return lorary.attach(model, plan, data=tiny.data_for(plan)).train()


def signatures(model: Any) -> dict[str, dict[str, str]]:
    """site -> role -> `zero` or `some` gradient, or `none` at all."""
    found: dict[str, dict[str, str]] = {}
    for site, layer in adapted_layers(model).items():
        gradients = {role: p.grad for role, p in layer.params.items()}
        found[site] = {r: "none" if g is None else "some" if g.any() else "zero" for r, g in gradients.items()}
    return found


def test_every_method_is_in_the_table() -> None:
    """Those without a rank are in the tests of their papers."""
    ranked = {name for name in lorary.presets() if has_rank(lorary.method(name).delta)}
    assert set(TABLE) == ranked


@pytest.mark.parametrize("name", TABLE)
def test_the_first_gradients_of_the_task(name: str) -> None:
    model = attached(name)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    found = signatures(model)
    assert len(found) == 14
    assert all(roles == TABLE[name] for roles in found.values()), found


@pytest.mark.parametrize("name", ["lora", "dora", "o-lora", "delta-lora"])
def test_an_embedding_starts_the_other_way_round(name: str) -> None:
    """A has a gradient, in the columns of the tokens that occur."""
    model = attached(name, "embedding")
    tokens = tiny.ids()
    model(input_ids=tokens, labels=tokens).loss.backward()
    (layer,) = adapted_layers(model).values()
    A = layer.params["A"].grad
    assert not layer.params["B"].grad.any()
    seen = torch.zeros(A.shape[1], dtype=torch.bool).index_fill(0, tokens.flatten(), True)
    assert A[:, seen].any()
    assert not A[:, ~seen].any()


def test_penalties_reach_what_the_task_does_not() -> None:
    """AdaLoRA's P and Q, and the A of O-LoRA's second task."""
    model = attached("adalora")
    lorary.rules(model, 10).penalty().backward()
    assert all(r == {"P": "some", "E": "none", "Q": "some"} for r in signatures(model).values())
    first = lorary.Adapter.of(tiny.shaken(attached("o-lora")))
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("o-lora", r=4), after=[first]))
    past = {"A_past": "none", "B_past": "none"}
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    assert all(roles == LORA | past for roles in signatures(model).values())
    model.zero_grad()
    lorary.rules(model, 10).penalty().backward()
    assert all(roles == {"A": "some", "B": "none"} | past for roles in signatures(model).values())
