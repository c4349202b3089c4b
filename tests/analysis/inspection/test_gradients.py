"""first_gradients: the tensors that the first step reaches, and what it changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lorary
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.papers.test_first_gradients import TABLE, attached


def backward(model: Any) -> None:
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()


@pytest.mark.parametrize("name", [name for name in TABLE if name != "alora"])  # which no weight has the effect of
def test_the_roles_that_move_are_those_of_the_table(name: str) -> None:
    model = attached(name)
    found = lorary.first_gradients(model, lambda: backward(model))
    trained = {role for role, gradient in TABLE[name].items() if gradient != "none"}
    assert set(found.roles) - {"full"} == trained
    assert set(found.moving) - {"full"} == {role for role in trained if TABLE[name][role] == "some"}
    assert all(t.step == 0 for tensors in found.roles.values() for t in tensors), "no optimizer has stepped"
    assert all(site.effect == 0 for site in found.sites)


def test_loras_verdict_names_the_factor_that_waits() -> None:
    model = attached("lora")
    found = lorary.first_gradients(model, lambda: backward(model))
    assert found.verdict == "only B has a gradient in the first step: that of A is zero, because B is still zero"
    rows = {row[0]: row for row in found.rows()}
    assert (rows["A"][3], rows["A"][5], rows["B"][2], rows["B"][5]) == ("0", "none", "0", "all")
    pissa = attached("pissa")
    found = lorary.first_gradients(pissa, lambda: backward(pissa))
    assert found.verdict == "all that trains: A and B have a gradient in the first step"


def test_the_first_step_of_gradient_descent_is_the_papers_product() -> None:
    """W1 - W0 = -lr s^2 G A^T A, with G the gradient of the effective weight and B = 0."""
    model = attached("lora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.base.weight.requires_grad_()
    backward(model)
    expected = {}
    for name, layer in layers.items():
        A, G = layer.params["A"].detach(), layer.base.weight.grad
        change = 0.1 * layer.scale**2 * G @ A.T @ A
        expected[name] = float(change.norm() / layer.base.weight.detach().norm())
        layer.base.weight.requires_grad_(False)
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> None:
        backward(model)
        optimizer.step()

    found = lorary.first_gradients(model, step)
    for site in found.sites:
        assert site.effect == pytest.approx(expected[site.site], rel=1e-3)
        assert site.roles["B"].step == pytest.approx(0.1 * site.roles["B"].gradient, rel=1e-5)
        assert site.roles["A"].step == 0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "its values are back"
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "and no hook is left"


def test_accumulated_gradients_count_together_and_before_clipping() -> None:
    model = attached("lora")
    once = lorary.first_gradients(model, lambda: backward(model))
    model.zero_grad()

    def twice_and_clipped() -> None:
        backward(model)
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)

    found = lorary.first_gradients(model, twice_and_clipped)
    for a, b in zip(once.sites, found.sites, strict=True):
        assert b.roles["B"].gradient == pytest.approx(2 * a.roles["B"].gradient, rel=1e-5)


def test_weights_trained_in_full_are_measured_and_restored() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("full")))
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step() -> None:
        backward(model)
        optimizer.step()

    found = lorary.first_gradients(model, step)
    assert found.sites == ()
    assert found.moving == ["full"]
    assert found.full["lm_head.weight"].step == pytest.approx(0.01 * before.numel() ** 0.5, rel=0.05)
    assert torch.equal(model.lm_head.weight, before)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["full"]["lm_head.weight"]["gradient"] > 0


def bad(model: Any, step: Any) -> str:
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.first_gradients(model, step)
    return str(caught.value)


def test_what_cannot_be_measured_is_refused() -> None:
    model = attached("lora")
    assert "step: is a int, not a function that makes a step" in bad(model, 3)
    assert "step: no backward pass has reached a trained tensor" in bad(model, lambda: None)
    assert "no adapter is attached" in bad(tiny.seeded("LlamaForCausalLM"), lambda: None)

    def overflow() -> None:
        (model(input_ids=tiny.ids(), labels=tiny.ids()).loss * float("inf")).backward()

    told = bad(model, overflow)
    assert "model.layers.0.self_attn.q_proj.A: its gradient is not finite" in told
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters()), "no hook is left"


def test_a_step_that_removes_directions_is_refused() -> None:
    model = attached("adalora")
    rules = lorary.rules(model, 1)

    def step() -> None:
        backward(model)
        rules.after_backward()
        rules.after_step()
        from lorary.model.rank_pruning import resize_adapters

        resize_adapters(model, lorary.Adapter.of(model).compact().sites)

    assert "the step has changed its rank" in bad(model, step)
