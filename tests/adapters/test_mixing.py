"""Weighted sums of adapters: the sum of w s B A of unequal ranks and scales, live, merged, saved and read by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.mix import stacked
from lorary.errors import MethodError
from tests.adapters.models import BASES, by_peft, close, outputs

LLAMA = BASES[0]
WEIGHTS = [(0.6, 0.4), (1.0, -0.5)]
PAIRS: dict[str, tuple[tuple[tuple[str, ...], int, float], tuple[tuple[str, ...], int, float]]] = {
    "equal ranks": ((("lora",), 4, 8.0), (("lora",), 4, 4.0)),
    "unequal ranks": ((("lora",), 8, 16.0), (("lora",), 2, 5.0)),
    "one rsLoRA": ((("lora",), 4, 8.0), (("rslora",), 9, 6.0)),
}


def adapter(names: tuple[str, ...], r: int, alpha: float, seed: int) -> Adapter:
    """As after training."""
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=r, alpha=alpha), "all-linear"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return Adapter.of(model)


def truth(pair: Any, adapters: list[Adapter], weights: tuple[float, ...]) -> dict[str, Tensor]:
    """site -> the sum of w s B A in double precision, with s = alpha / r, of an rsLoRA alpha / sqrt(r)."""
    total: dict[str, Tensor] = {}
    for (names, r, alpha), value, w in zip(pair, adapters, weights, strict=True):
        s = alpha / (r**0.5 if "rslora" in names else r)
        for name, t in value.tensors.items():
            total[name] = total.get(name, torch.zeros(())) + w * s * t["B"].double() @ t["A"].double()
    return total


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_mix_is_the_weighted_sum_of_the_updates(pair: Any, weights: tuple[float, ...], tmp_path: Path) -> None:
    adapters = [adapter(*each, seed=seed) for seed, each in enumerate(pair)]
    expected = truth(pair, adapters, weights)
    mix = stacked(adapters, LLAMA.model(), weights)
    for name, form in mix.low_rank().items():
        gap = form.B.double() @ form.A.double() - expected[name]
        assert gap.norm() < 1e-6 * expected[name].norm()
        assert form.A.shape[0] == sum(r for _, r, _ in pair)
    dense = LLAMA.model()
    with torch.no_grad():
        for name, update in expected.items():
            dense.get_submodule(name).weight += update.float()
    y, base = outputs(dense), outputs(LLAMA.model())
    assert not torch.allclose(y, base, atol=1e-2)
    live = lorary.switch(LLAMA.model(), mix)
    close(outputs(live), y)
    lorary.save_adapter(mix, tmp_path)
    close(by_peft(LLAMA, tmp_path), y)
    close(outputs(lorary.merge(live)), y)


def test_switching_to_several_adds_them_with_weight_one() -> None:
    pair = PAIRS["one rsLoRA"]
    adapters = [adapter(*each, seed=seed) for seed, each in enumerate(pair)]
    dense = LLAMA.model()
    with torch.no_grad():
        for name, update in truth(pair, adapters, (1.0, 1.0)).items():
            dense.get_submodule(name).weight += update.float()
    close(outputs(lorary.switch(LLAMA.model(), adapters)), outputs(dense))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_dora_has_no_weighted_sum(weights: tuple[float, ...]) -> None:
    """Its update depends on the norm of the whole weight: refused at every site, and the model stays as it is."""
    plain, dora = adapter(("lora",), 4, 8.0, seed=0), adapter(("dora",), 4, 8.0, seed=1)
    model = LLAMA.model()
    before = outputs(model)
    for add in (lambda: stacked([plain, dora], model, weights), lambda: lorary.switch(model, [plain, dora])):
        with pytest.raises(MethodError) as refusal:
            add()
        assert refusal.value.headline == "cannot add these adapters:"
        first, *more = dora.tensors
        (problem,) = refusal.value.problems
        assert problem.where == f"{first} and {len(more)} more"
        assert problem.what == "adapters[1] gives its output a gain or a shift of its own (MagnitudeDirection)"
    assert torch.equal(outputs(model), before)
