"""EVA: A at the principal directions of the inputs, and ranks where they explain the most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.methods.eva import InputDirectionsInit
from tests import tiny


class Narrow(nn.Module):
    """Three layers in a row: the second and third read what varies in two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        with torch.no_grad():
            self.first.weight[2:].mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x)))
        return y


def inputs(model: nn.Module, x: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0].flatten(0, -2)


def narrow() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return Narrow().double(), torch.randn(4, 30, 12).double()


def test_a_starts_at_the_principal_directions_and_b_at_zero() -> None:
    model, x = narrow()
    X = inputs(model, x, "second")
    before = model(x).detach()
    plan = lorary.plan(model, lorary.method("eva", r=3, alpha=6, rho=1.0), ["first", "second"])
    lorary.attach(model, plan, data=[x], dtype=torch.float64)
    layer = adapted_layers(model)["second"]
    Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)[2][:3]
    A = layer.params["A"].detach()
    torch.testing.assert_close((A @ Vh.T).abs(), torch.eye(3).double(), rtol=0, atol=1e-8)
    assert not layer.params["B"].any()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_the_ranks_go_to_the_directions_that_explain_the_most() -> None:
    model, x = narrow()
    plan = lorary.plan(model, lorary.method("eva", r=3, alpha=6), ["first", "second", "third"])
    found = lorary.calibrate(model, plan, [x])
    shares = {}
    for name in ("first", "second", "third"):
        X = inputs(model, x, name)
        S = torch.linalg.svdvals(X - X.mean(0)) ** 2
        shares |= {(name, i): float(share) for i, share in enumerate((S / S.sum())[:6])}
    won = sorted(shares, key=lambda key: -shares[key])[:9]
    expected = {name: sum(key[0] == name for key in won) for name in ("first", "second", "third")}
    assert {p.site.name: p.r for p in found.sites} == {name: r for name, r in expected.items() if r}
    assert sum(p.r for p in found.sites) == 9
    assert max(p.r for p in found.sites) <= 6  # rho r
    assert {p.scale for p in found.sites} == {2.0}  # alpha follows the rank
    assert "moved ranks between layers" in found.notes[-1]


def test_a_layer_that_wins_no_rank_gets_no_adapter() -> None:
    model, x = narrow()
    plan = lorary.plan(model, lorary.method("eva", r=1, alpha=6, rho=3.0), ["first", "second", "third"])
    lorary.attach(model, plan, data=[x])
    assert "first" not in adapted_layers(model)
    assert sum(layer.delta.r for layer in adapted_layers(model).values()) == 3
    lorary.merge(model)


def test_only_labelled_tokens_count() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method("eva", r=2, rho=1.0), ["q_proj"])
    ids = torch.randint(3, 38, (3, 16))
    labels = ids.clone()
    labels[:, :8] = -100
    masked = lorary.calibrate(model, plan, [{"input_ids": ids, "labels": labels}])
    padded = torch.ones_like(ids)
    padded[0, 12:] = 0
    more = lorary.calibrate(model, plan, [{"input_ids": ids, "labels": labels, "attention_mask": padded}])
    name = plan.sites[-1].site.name
    X = _hidden(model, ids, name)
    for found, kept in ((masked, labels != -100), (more, (labels != -100) & padded.bool())):
        mine = X if found is masked else _hidden(model, ids, name, attention_mask=padded)
        rows = mine[kept]
        Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
        A = found.fixed_tensors[name]["A"]
        torch.testing.assert_close(torch.linalg.svdvals(A @ Vh.T), torch.ones(2), rtol=0, atol=1e-4)


def _hidden(model: Any, ids: Tensor, name: str, **options: Any) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, **options)
    handle.remove()
    return found[0]


def test_whitening_divides_by_the_root_of_the_singular_value() -> None:
    model, x = narrow()
    X = inputs(model, x, "first")
    plan = lorary.plan(model, lorary.method("eva", r=3, rho=1.0, whiten=True), ["first"])
    A = lorary.calibrate(model, plan, [x]).fixed_tensors["first"]["A"]
    S = torch.linalg.svdvals(X - X.mean(0))[:3]
    torch.testing.assert_close(A.norm(dim=1), S**-0.5)


def test_the_defaults_are_the_authors() -> None:
    assert lorary.method("eva").init == InputDirectionsInit(rho=2.0, samples=128, whiten=False)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_pefts_start_is_ours(rho: float) -> None:
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    model, theirs = tiny.seeded("LlamaForCausalLM"), tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method("eva", r=2, alpha=4, rho=rho), ["q_proj", "o_proj", "down_proj"])
    data = tiny.data_for(plan)
    assert data is not None
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "o_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho),
    )
    peft = get_eva_state_dict(theirs, data, config, show_progress_bar=False)
    found = lorary.calibrate(model, plan, data)
    assert {p.site.name: p.r for p in found.sites} == {name: len(A) for name, A in peft.items() if len(A)}
    for p in found.sites:
        cosines = nn.functional.cosine_similarity(found.fixed_tensors[p.site.name]["A"], peft[p.site.name])
        assert cosines.min() > 0.99, p.site.name
