"""Packed layers that are no nn.Linear and have no `weight`: unknown ones are told, and three lines make them known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import PlanError
from lorary.layers import other_quantizers, quantized_weight
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.layers.other_quantizers.checks import check_adapter
from tests.layers.other_quantizers.gptq import QuantLinear, quantise


def base() -> Any:
    return quantise(tiny.seeded("LlamaForCausalLM", attention_bias=True))


@pytest.fixture
def known() -> Iterator[None]:
    @quantized_weight.register_quantized("linear", f"{QuantLinear.__module__}.QuantLinear")
    def dense(layer: Any) -> Tensor:
        return layer.dequantize_weight().T

    yield
    del quantized_weight._REGISTRY[f"{QuantLinear.__module__}.QuantLinear"]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("preset", ["lora", "dora", "vera", "lora-fa"])
def test_it_is_adapted(preset: str, tmp_path: Path) -> None:
    options = {"r": 8} if preset == "vera" else {"r": 2}
    check_adapter(base, lorary.method(preset, **options), tmp_path / "adapter", 1e-4)


@pytest.mark.usefixtures("known")
def test_the_plan_counts_the_numbers_that_it_stands_for() -> None:
    plain = tiny.seeded("LlamaForCausalLM", attention_bias=True)
    plan = lorary.plan(base(), lorary.method("lora", r=2))
    weightless = [p for name, p in plain.named_parameters() if not ("_proj" in name and name.endswith(".bias"))]
    assert plan.total == sum(p.numel() for p in weightless)  # its biases are buffers
    assert [p.site for p in plan.sites] == [p.site for p in lorary.plan(plain, lorary.method("lora", r=2)).sites]
    assert not any("no adapter reaches" in note for note in plan.notes)


@pytest.mark.usefixtures("known")
def test_an_adapter_of_it_fits_the_plain_base(tmp_path: Path) -> None:
    model = tiny.trained(base(), lorary.method("lora", r=2))
    lorary.save(model, tmp_path)
    dense = lorary.load(tiny.seeded("LlamaForCausalLM", attention_bias=True), tmp_path)
    assert (tiny.logits(dense) - tiny.logits(model)).abs().max() < 0.1


@pytest.mark.usefixtures("known")
def test_what_asks_for_a_weight_of_its_own_is_refused() -> None:
    with pytest.raises(PlanError, match="is quantised already, and QRInit has to subtract its start from the weight"):
        lorary.plan(base(), lorary.method("olora", r=2))
    with pytest.raises(PlanError, match=r"q_proj\.weight: is quantised, and .* writes it"):
        lorary.plan(base(), lorary.method("delta-lora", r=2, mode="paper"), "q_proj")


def test_an_unknown_one_is_told_with_what_to_do() -> None:
    model = base()
    sentence = (
        "QuantLinear stores its weight in a quantised form that lorary does not know; register it: "
        'lorary.layers.quantized_weight.register_quantized("linear", "tests.layers.other_quantizers.gptq.QuantLinear")'
        "(dense), where dense(layer) returns the dense weight; "
        "lorary.layers.quantized_weight.weight_by_forward works for any linear layer"
    )
    for targets in ("all-linear", "attention", "q_proj"):
        with pytest.raises(PlanError) as error:
            lorary.plan(model, lorary.method("lora", r=2), targets)
        assert sentence in str(error.value), targets
    assert lorary.plan(model, lorary.method("lora", r=2), "lm_head").sites  # nobody asked for them
    assert lorary.plan(tiny.llama(), lorary.method("lora", r=2)).sites


def test_an_unknown_child_of_a_linear_layer_is_told_as_well() -> None:
    class Int8Linear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 4, bias=False)
            self.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T.to(x.dtype)

    model = nn.Sequential(Int8Linear(), nn.Linear(4, 2))
    with pytest.raises(PlanError, match="0: Int8Linear stores its weight in a quantised form that lorary does not"):
        lorary.plan(model, lorary.method("lora", r=2))
    assert len(lorary.plan(model, lorary.method("lora", r=2), exclude="0").sites) == 1


def test_a_layer_is_asked_by_its_forward_pass() -> None:
    layer = QuantLinear(nn.Linear(48, 24))
    W = quantized_weight.weight_by_forward(layer, rows=7)
    torch.testing.assert_close(W, layer.dequantize_weight().T, rtol=0, atol=1e-3, check_dtype=False)
    plain = nn.Linear(48, 24)
    torch.testing.assert_close(quantized_weight.weight_by_forward(plain), plain.weight, rtol=0, atol=1e-6)


class Deaf(QuantLinear):
    """Kernels for inference: no gradient comes back, and nothing says so."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.usefixtures("known")
def test_a_layer_that_lets_no_gradient_through_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Deaf(nn.Linear(16, 8)))
    plan = lorary.plan(model, lorary.method("lora", r=2))
    with pytest.raises(PlanError, match="1: Deaf lets no gradient through: the layers before it could not be trained"):
        lorary.attach(model, plan)
    assert not adapted_layers(model)


def test_awq_s_layout() -> None:
    """Codes [inp, out], eight columns to a word in the order 0 2 4 6 1 3 5 7, a zero and a scale for each group."""
    torch.manual_seed(0)
    inp, out, group = 32, 16, 8
    codes = torch.randint(0, 16, (inp, out))
    zeros = torch.randint(0, 16, (inp // group, out))
    scales = torch.rand(inp // group, out).half()

    def words(numbers: Tensor) -> Tensor:
        eights = numbers.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        packed = (eights << (4 * torch.arange(8))).sum(-1)
        return torch.where(packed >= 2**31, packed - 2**32, packed).int()

    class Layer(nn.Module):
        bits, in_features, out_features = 4, inp, out

    layer: Any = Layer()
    layer.qweight, layer.qzeros, layer.scales = words(codes), words(zeros), scales
    expected = scales.repeat_interleave(group, 0) * (codes - zeros.repeat_interleave(group, 0))
    assert torch.equal(other_quantizers._awq(layer), expected.T)
