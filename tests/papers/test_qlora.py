"""QLoRA: y = Dq(Wq) x + b + s B A x; sizes on LLaMA-2-7B, and the gradient that goes through the packed weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorary
from lorary.kernels.nf4 import CODE, DYNAMIC, dequantize, quantize
from lorary.layers.adapted import adapted_layers
from lorary.layers.nf4 import NF4, NF4Linear
from lorary.layers.quantized_weight import weight
from tests import tiny

from .layers import attached, dense_gradient, loss_of, shake, signature
from .test_counts import llama_2_7b

# the published values to the bit
HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
X = torch.linspace(-2, 2, 6 * 72).reshape(6, 72).double()


def layer(*names: str, **options: Any) -> Any:
    torch.manual_seed(1)
    return attached(nn.Linear(72, 40), "qlora", *names, **options)


# --- NF4 --------------------------------------------------------------------------------------------------------------


def test_the_sixteen_values_are_the_published_ones() -> None:
    assert " ".join(f"{bits & 0xFFFFFFFF:08x}" for bits in CODE.view(torch.int32).tolist()) == HEX
    assert (DYNAMIC.min().item(), DYNAMIC.max().item()) == (pytest.approx(-0.99296874), 1.0)


def test_they_are_quantiles_of_the_normal_distribution() -> None:
    """Eight above zero, seven below, and a zero; the outermost between 1 - 1/32 and 1 - 1/30."""
    quantile, most = torch.distributions.Normal(0.0, 1.0).icdf, (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = quantile(torch.linspace(most, 0.5, 9)[:-1]), quantile(torch.linspace(most, 0.5, 8)[:-1])
    values = torch.cat([above, -below, torch.zeros(1)]).sort().values
    torch.testing.assert_close(CODE, values / values.max(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
def test_packing_loses_half_a_gap_at_most_and_nothing_twice(double: bool) -> None:
    W = torch.randn(96, 200)
    once = dequantize(quantize(W, double=double))
    assert torch.equal(quantize(once, double=False).codes, quantize(W, double=double).codes)
    if not double:
        largest = W.flatten().view(-1, 64).abs().amax(1, keepdim=True)
        upper = torch.searchsorted(CODE, (W.flatten().view(-1, 64) / largest).clamp(-1, 1)).clamp(min=1)
        gap = (CODE[upper] - CODE[upper - 1]) * largest
        assert ((W - once).flatten().view(-1, 64).abs() <= gap / 2 + 1e-6).all()
    rmse = ((W - once).norm() / W.norm()).item()
    assert rmse == pytest.approx(0.092, abs=0.002)


def test_largest_values_in_8_bits_are_within_1_5_percent() -> None:
    W = torch.randn(512, 512) * 0.02
    packed = quantize(W)
    found = DYNAMIC[packed.absmax.int()].view(-1, 256) * packed.nested_absmax[:, None] + packed.nested_offset
    largest = W.view(-1, 64).abs().amax(1)
    error = ((found.flatten() - largest) / largest).abs().max().item()
    assert 0 < error < 0.015


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), {"A": "zero", "B": "some"}),
        (("lora-fa",), {"A": "none", "B": "some"}),
        (("dora",), {"A": "zero", "B": "some", "m": "some"}),
        (("pissa",), {"A": "some", "B": "some"}),
    ],
)
def test_the_first_gradients(names: tuple[str, ...], expected: dict[str, str]) -> None:
    found = layer(*names)
    assert signature(found, X) == expected
    assert [name for name, p in found.base.named_parameters() if p.requires_grad or p.grad is not None] == []


def test_forward_and_gradients_are_those_of_the_dense_formula() -> None:
    """Closed forms at W = Dq(Wq): dB = s G A^T, dA = s B^T G, dx = Gy (Dq(Wq) + s B A)."""
    found = shake(layer())
    assert isinstance(found.base, NF4Linear)
    W, s, A, B = weight(found.base), found.scale, found.params["A"], found.params["B"]
    assert W.dtype == torch.float64
    x = X.clone().requires_grad_()
    y = found(x)
    torch.testing.assert_close(y, F.linear(x, W + s * B @ A, found.bias), rtol=1e-7, atol=1e-7)
    loss_of(y).backward()
    G = dense_gradient(found, X, W + s * B @ A)
    torch.testing.assert_close(B.grad, s * G @ A.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(A.grad, s * B.T @ G, rtol=1e-6, atol=1e-6)
    other = X.clone().requires_grad_()
    loss_of(F.linear(other, (W + s * B @ A).detach(), found.bias)).backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-6)


def test_the_gradient_reaches_what_comes_before_the_packed_layers() -> None:
    model: Any = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2)))
    tiny.shaken(model)
    model(tiny.ids(), labels=tiny.ids()).loss.backward()
    first, last = (list(adapted_layers(model).values())[i] for i in (0, -1))
    assert all(layer.params[role].grad.abs().max() > 0 for layer in (first, last) for role in "AB")


def test_q_dora_takes_the_norms_of_the_packed_weight() -> None:
    found = layer("dora")
    torch.testing.assert_close(found.params["m"].detach(), weight(found.base).norm(dim=1), rtol=1e-6, atol=1e-6)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_qlora_on_llama_2_7b() -> None:
    """r = 64 on every linear layer: 159,907,840 train, beside 3.34 GB of packed weights, and 0.52 GB in 16 bits."""
    model = llama_2_7b()
    plan = lorary.plan(model, lorary.method("qlora", r=64, alpha=16))
    assert (plan.trainable, len(plan.quantized), len(plan.sites)) == (159_907_840, 224, 224)
    assert {p.scale for p in plan.sites} == {0.25}
    sizes = [model.get_parameter(f"{name}.weight").numel() for name in plan.quantized]
    assert sum(sizes) == 6_476_005_376
    double, single = (sum(storage.bytes(n) for n in sizes) for storage in (NF4(), NF4(double=False)))
    assert (round(double / 1e9, 2), round(single / 1e9, 2)) == (3.34, 3.64)
    assert 8 * double / sum(sizes) == pytest.approx(4.12695, abs=1e-5)
    assert 8 * single / sum(sizes) == 4.5


def test_the_plan_tells_the_bytes_that_the_packed_model_takes() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method("qlora", r=2))
    lorary.quantize(model)
    taken = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model)}
    rotary = sum(b.numel() * 4 for name, b in model.named_buffers() if "inv_freq" in name)
    assert plan.base_bytes == sum(taken.values()) - rotary


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
