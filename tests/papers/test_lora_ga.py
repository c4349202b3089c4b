"""LoRA-GA: the start at the gradient's singular directions, and the first step that it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.methods.lora_ga import GradientInit
from tests import tiny

from .layers import EACH_EVEN, loss_of, matrix


def start(layer: nn.Module, x: Tensor, r: int = 2, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """The layer with LoRA-GA, its weight before as [out, in], and the loss's gradient there."""
    model = nn.Sequential(layer.double())
    method = lorary.method("lora-ga", **{"r": r, "alpha": 6.0, "niter": None} | options)
    plan = lorary.plan(model, method, "0")
    plain = lorary.attach(nn.Sequential(layer), lorary.plan(model, lorary.method("lora", r=1), "0"))
    W = matrix(adapted_layers(plain)["0"]).clone().requires_grad_()
    one = adapted_layers(plain)["0"]
    loss_of(one.kind.run(one.base, x, W, one.bias)).backward()
    lorary.detach(plain)
    assert W.grad is not None
    lorary.attach(model, plan, data=[x], loss=lambda y, _: loss_of(y), dtype=torch.float64)
    return adapted_layers(model)["0"], W.detach(), W.grad


@EACH_EVEN
def test_the_start_is_that_of_algorithm_1(make: Any, x: Any) -> None:
    layer, W, G = start(make(), x(), r=2)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    c = G.shape[0] ** 0.25 / 16**0.5
    B, A = (t.detach() for t in layer.factors())
    for found, expected in ((A, c * Vh[:2]), (B.T, c * U[:, 2:4].T)):
        cosines = (found @ expected.T).abs() / c**2  # the sign of a singular direction is free
        torch.testing.assert_close(cosines, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix(layer), W - layer.scale * B @ A, rtol=0, atol=1e-12)


def test_the_first_step_is_the_best_of_rank_2r() -> None:
    """Theorem 3.1: the step of B and A moves W along the gradient's first 2 r directions, and along nothing else."""
    layer, _, G = start(nn.Linear(12, 10), x := torch.randn(7, 12).double(), r=2)
    loss_of(layer(x)).backward()
    B, A = (layer.params[role] for role in "BA")
    assert A.grad is not None
    assert B.grad is not None
    step = layer.scale * (B.grad @ A + B @ A.grad).detach()
    U, S, Vh = torch.linalg.svd(G)
    best = U[:, :4] * S[:4] @ Vh[:4]
    torch.testing.assert_close(step / step.norm(), best / best.norm(), rtol=1e-5, atol=1e-6)


def test_gamma_divides_the_start() -> None:
    x = torch.randn(7, 12).double()
    sizes = [start(nn.Linear(12, 10), x, gamma=g)[0].params["B"].norm().item() for g in (16.0, 64.0)]
    assert sizes[0] == pytest.approx(2 * sizes[1])
    assert sizes[0] == pytest.approx(2**0.5 * 10**0.25 / 4)


def test_the_randomised_decomposition_finds_the_same_directions() -> None:
    x = torch.randn(30, 48).double()
    torch.manual_seed(0)
    exact, fast = nn.Linear(48, 40), nn.Linear(48, 40)
    fast.load_state_dict(exact.state_dict())
    one, other = (start(layer, x, r=3, niter=n)[0].params["A"].detach() for layer, n in ((exact, None), (fast, 4)))
    overlap = torch.linalg.svdvals(one @ other.T) / (one[0] @ one[0])
    assert overlap.min() > 0.99


def test_the_defaults_are_the_authors() -> None:
    assert lorary.method("lora-ga").init == GradientInit(gamma=16.0, samples=8, niter=4)


def test_the_count_is_loras() -> None:
    model = tiny.llama()
    ours, loras = (lorary.plan(model, lorary.method(name, r=3)).trainable for name in ("lora-ga", "lora"))
    assert ours == loras


def test_tied_weights_count_each_use_by_itself() -> None:
    """The head's own gradient, not that of the embedding it is tied to."""
    model = tiny.llama(tie_word_embeddings=True)
    plan = lorary.plan(model, lorary.method("lora-ga", r=2, alpha=2, niter=None), ["lm_head"])
    data = tiny.data_for(plan)
    assert data is not None
    hidden: list[Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    logits = model(**data[0]).logits.detach().requires_grad_()
    handle.remove()
    targets = data[0]["labels"][:, 1:]
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    assert logits.grad is not None
    G = logits.grad.flatten(0, 1).T @ hidden[0].flatten(0, 1)
    A = lorary.calibrate(model, plan, data).fixed_tensors["lm_head"]["A"]
    Vh = torch.linalg.svd(G, full_matrices=False)[2][:2]
    assert torch.linalg.svdvals(A @ Vh.T).min() / A[0].norm() > 0.999


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PEFT's, at the first layer
def test_pefts_directions_are_ours() -> None:
    """PEFT scales A by 1 and B by singular values; what both take from the gradient is the same."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    model, theirs = tiny.seeded("LlamaForCausalLM"), tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method("lora-ga", r=2, alpha=2, niter=None), ["q_proj", "down_proj"])
    data = tiny.data_for(plan)
    assert data is not None
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    preprocess_loraga(theirs, config, lambda: theirs(**data[0]).loss.backward())
    wrapped = get_peft_model(theirs, config)
    for name, tensors in lorary.calibrate(model, plan, data).fixed_tensors.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        for ours, peft in (
            (tensors["A"], layer.lora_A["default"].weight.detach()),
            (tensors["B"].T, layer.lora_B["default"].weight.detach().T),
        ):
            cosines = nn.functional.cosine_similarity(ours, peft).abs()
            torch.testing.assert_close(cosines, torch.ones(2), atol=2e-3, rtol=0)
