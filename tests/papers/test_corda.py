"""CorDA: the start at directions of W C, the largest or the smallest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.methods.corda import ContextInit, damped
from tests import tiny

from .layers import matrix

X = torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(1)).double()


def start(mode: str, r: int = 2, alpha: float = 6.0, data: Tensor = X) -> tuple[Any, Tensor]:
    """A layer with CorDA, and its weight before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10).double())
    W = model[0].weight.detach().clone()
    plan = lorary.plan(model, lorary.method("corda", r=r, alpha=alpha, mode=mode), "0")
    lorary.attach(model, plan, data=[data], dtype=torch.float64)
    return adapted_layers(model)["0"], W


def covariance(data: Tensor) -> Tensor:
    """As in the authors' code: every row of the data divided by its largest number, and the mean over the rows."""
    return sum(((x / x.max()).T @ (x / x.max()) for x in data), torch.zeros(12, 12).double()) / len(data)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("alpha", [2.0, 64.0])
def test_the_start_is_a_part_of_the_weighted_decomposition(mode: str, alpha: float) -> None:
    layer, W = start(mode, alpha=alpha)
    C = covariance(X)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(12).double()
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(2) if mode == "instruction" else slice(-2, None)
    part = U[:, chosen] * S[chosen] @ Vh[chosen] @ torch.linalg.inv(C)
    B, A = (t.detach() for t in layer.factors())
    torch.testing.assert_close(layer.scale * B @ A, part, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(matrix(layer), W - part, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(B.T @ B, torch.diag(S[chosen] / layer.scale), rtol=1e-6, atol=1e-8)


def test_what_stays_frozen_answers_the_data_in_the_knowledge_mode() -> None:
    """Without its adapter, a layer in the knowledge mode loses less of its output on the data than in the other."""
    lost = {}
    for mode in ("instruction", "knowledge"):
        layer, W = start(mode, r=4)
        lost[mode] = float((X @ (W - matrix(layer)).T).norm())
    assert lost["knowledge"] < lost["instruction"] / 3


def test_fewer_tokens_than_inputs_are_damped() -> None:
    C = X[0, :4].T @ X[0, :4]  # of rank 4
    raised, inverse = damped(C)
    assert torch.dist(raised @ inverse, torch.eye(12).double()) < 0.05
    layer, _ = start("instruction", data=X[:1, :4])
    assert all(p.isfinite().all() for p in layer.params.values())


def test_the_defaults_are_the_authors() -> None:
    assert lorary.method("corda").init == ContextInit(mode="instruction", samples=256)


@pytest.mark.parametrize(("mode", "word"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_pefts_start_is_ours(mode: str, word: str) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, theirs = tiny.seeded("LlamaForCausalLM"), tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method("corda", r=2, alpha=6, mode=mode), ["q_proj", "down_proj"])
    data = tiny.data_for(plan)
    assert data is not None
    rows = [{"input_ids": ids[None]} for ids in data[0]["input_ids"]]
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=word),
    )
    preprocess_corda(theirs, config, run_model=lambda: [theirs(**row) for row in rows])
    wrapped = get_peft_model(theirs, config)
    for name, tensors in lorary.calibrate(model, plan, data).fixed_tensors.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        B, A = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(tensors["B"] @ tensors["A"], B @ A, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(tensors["A"].abs(), A.abs(), rtol=1e-3, atol=1e-4)
