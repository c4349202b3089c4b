"""LoftQ: quantisation and decomposition in turn, so that Q + s B A starts near W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.errors import MethodError, PlanError
from lorary.layers.adapted import adapted_layers
from lorary.layers.quantized_weight import weight
from lorary.methods.loftq import QuantizationErrorInit
from lorary.spec.site import Site
from tests import tiny


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))


def quantised(W: Tensor) -> Tensor:
    """Dq(Q(W)) of QLoRA's own storage."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    return weight(lorary.NF4().quantize(layer, W)).float()


def algorithm_1(W: Tensor, r: int, rounds: int) -> Tensor:
    """The product of the two factors after T rounds."""
    BA = torch.zeros_like(W)
    for _ in range(rounds):
        U, S, Vh = torch.linalg.svd(W - quantised(W - BA))
        BA = U[:, :r] * S[:r] @ Vh[:r]
    return BA


@pytest.mark.parametrize("rounds", [1, 5])
@pytest.mark.parametrize("alpha", [8.0, 64.0])
def test_the_start_is_that_of_algorithm_1(rounds: int, alpha: float) -> None:
    model = plain()
    W = model[0].weight.detach().clone()
    expected = algorithm_1(W, 8, rounds)
    lorary.attach(model, lorary.plan(model, lorary.method("loftq", r=8, alpha=alpha, rounds=rounds), "0"))
    layer = adapted_layers(model)["0"]
    B, A = (t.detach() for t in layer.factors())
    torch.testing.assert_close(layer.scale * B @ A, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight(layer.base).float(), quantised(W - layer.scale * B @ A), rtol=0, atol=1e-6)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-3, atol=1e-5)  # the roots are in both


def test_it_starts_nearer_to_w_than_quantising_alone() -> None:
    """Of a Gaussian W of 128 x 128; the paper, which ends with a decomposition, is a part of a round further."""
    W = 0.02 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for name, options in (("qlora", {}), ("loftq", {"rounds": 1}), ("loftq", {})):
        model = nn.Sequential(nn.Linear(128, 128))
        model[0].weight.data.copy_(W)
        lorary.attach(model, lorary.plan(model, lorary.method(name, r=16, alpha=16, **options), "0"))
        layer = adapted_layers(model)["0"]
        errors.append(float((layer.merged(weight(layer.base).float())[0] - W).norm()))
    assert errors[2] < errors[1] < errors[0]
    paper = algorithm_1(W, 16, 5)
    assert errors[2] < 1.03 * float((W - quantised(W - algorithm_1(W, 16, 4)) - paper).norm())


def test_the_start_is_small_beside_pissas() -> None:
    """It holds a part of the quantisation error, and PiSSA's a part of W."""
    sizes = []
    for names in (("loftq",), ("qlora", "pissa")):
        model = plain()
        lorary.attach(model, lorary.plan(model, lorary.method(*names, r=8, alpha=8, rounds=5), "0"))
        sizes.append(float(adapted_layers(model)["0"].params["B"].detach().norm()))
    assert sizes[0] < sizes[1] / 2


def test_it_is_saved_loaded_and_exported(tmp_path: Any) -> None:
    """The start determines the base: the loaded model is the saved one, bit for bit."""
    model = tiny.trained(tiny.seeded("LlamaForCausalLM"), lorary.method("loftq", r=2, alpha=4))
    lorary.save(model, tmp_path / "adapter")
    again = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "adapter")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    form = lorary.Adapter.of(model).low_rank()
    assert {f.A.shape[0] for f in form.values()} == {4}  # 2 r: exact on the unmodified base


def test_the_default_is_the_papers() -> None:
    assert lorary.method("loftq").init == QuantizationErrorInit(rounds=5)
    assert lorary.method("loftq", "qlora") == lorary.method("loftq")


def test_a_base_that_is_not_quantised_is_refused() -> None:
    with pytest.raises(MethodError, match="starts at the quantisation error, and Unquantized has none"):
        lorary.method("lora", init=QuantizationErrorInit())
    tied = tiny.llama(tie_word_embeddings=True)
    with pytest.raises(PlanError, match="lm_head: stays as it is, and QuantizationErrorInit starts at the quant"):
        lorary.plan(tied, lorary.method("loftq", r=2), ["q_proj", "lm_head"])
    with pytest.raises(PlanError, match="is quantised already"):
        lorary.plan(lorary.quantize(tiny.llama(), lorary.NF4()), lorary.method("loftq", r=2))
    assert QuantizationErrorInit().problems(Site("x", "linear", 4, 6, False), 5)


@pytest.mark.parametrize("names", [("loftq",), ("qlora", "pissa")])
def test_gpt2s_transposed_layers_start_as_linear_ones(names: tuple[str, ...]) -> None:
    """Of a square weight a transposed error would go unnoticed but for the numbers."""
    torch.manual_seed(0)
    linear, conv = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(Conv1D(64, 64))
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight.T)
        conv[0].bias.copy_(linear[0].bias)
    x = torch.randn(3, 64)
    for model in (linear, conv):
        lorary.attach(model, lorary.plan(model, lorary.method(*names, r=4, alpha=8, rounds=3), "0"))
    torch.testing.assert_close(conv(x), linear(x), rtol=1e-5, atol=1e-6)
