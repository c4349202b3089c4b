"""Low-rank forms: any adapter as a change of the unmodified base, whatever is attached to that base meanwhile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.adapters.adapter import Adapter
from lorary.adapters.low_rank_form import LowRankForm
from lorary.errors import MethodError
from tests import tiny

METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any], int, bool]] = {  # options, exported rank, gain
    "lora": (("lora",), {}, 2, False),
    "rslora": (("rslora",), {"alpha": 3.0}, 2, False),
    "lora-fa": (("lora-fa",), {}, 2, False),
    "dora": (("dora",), {}, 2, True),
    "dora, exact": (("dora",), {"exact": True}, 2, True),
    "pissa": (("pissa",), {}, 4, False),
    "olora": (("olora",), {"divide": True}, 4, False),
    "vera": (("vera",), {}, 2, False),
    "melora": (("melora",), {"n": 2}, 4, False),
    "multilora": (("multilora",), {"n": 3}, 6, False),
    "dora, pissa": (("dora", "pissa"), {}, 4, True),
    "vera, dora": (("vera", "dora"), {}, 2, True),
    "melora, dora, rslora": (("melora", "dora", "rslora"), {"n": 2}, 4, True),
}
LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 6)),
    "transposed": (lambda: Conv1D(4, 6), lambda: torch.randn(3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(8, 4), lambda: torch.tensor([[1, 5], [7, 0]])),
}


def made(method: lorary.Method, make: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(make())
    lorary.attach(model, lorary.plan(model, method, "0"))
    return tiny.shaken(model)


def by_form(layer: Any, x: Tensor, form: LowRankForm) -> Tensor:
    """gain * (W x + B A x) + b + shift, from the plain layer alone."""
    site = lorary.plan(nn.Sequential(layer), lorary.method(r=1), "0").sites[0].site
    kind = lorary.layers.kinds.KINDS[site.kind]
    y = kind.run(layer, x, kind.matrix(layer) + form.B @ form.A, None)
    y = y if form.gain is None else y * kind.broadcast_over_rows(form.gain)
    for offset in (getattr(layer, "bias", None), form.shift):
        y = y if offset is None else y + kind.broadcast_over_rows(offset)
    return y.detach()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_form_on_the_plain_base_is_the_adapted_layer(name: str, layer: str) -> None:
    names, options, rank, gain = METHODS[name]
    make, x = LAYERS[layer]
    if name == "lora-fa" and layer == "embedding":
        pytest.skip("refused: A starts at zero there")
    torch.manual_seed(0)
    base = make()
    model = made(lorary.method(*names, r=2, **options), make)
    inputs = x()
    form = Adapter.of(model).low_rank(nn.Sequential(base))["0"]
    assert form.B.shape[1] == form.A.shape[0] == rank
    assert (form.gain is not None) == gain
    assert {t.dtype for t in form if t is not None} == {torch.float32}
    torch.testing.assert_close(by_form(base, inputs, form), model(inputs).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_without_the_base(name: str) -> None:
    names, options, _, gain = METHODS[name]
    adapter = Adapter.of(made(lorary.method(*names, r=2, **options), LAYERS["linear"][0]))
    if gain:
        with pytest.raises(MethodError) as refusal:
            adapter.low_rank()
        assert str(refusal.value) == (
            "this adapter has no low-rank form:\n"
            "  - 0: MagnitudeDirection has no such form without the base's weight\n"
            "      hint: give the base"
        )
    else:
        assert adapter.low_rank()["0"].gain is None


def test_a_base_that_lacks_the_layer() -> None:
    adapter = Adapter.of(made(lorary.method("dora", r=2), LAYERS["linear"][0]))
    with pytest.raises(MethodError, match="0: the model has no such module"):
        adapter.low_rank(nn.ModuleDict({"other": nn.Linear(6, 4)}))
    with pytest.raises(MethodError, match="0: has 5 output features, expected 4"):
        adapter.low_rank(nn.Sequential(nn.Linear(6, 5)))


@pytest.mark.parametrize("here", [("lora",), ("pissa",), ("olora", "dora"), ("dora",)], ids=" ".join)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_attached_to_the_base_meanwhile_does_not_matter(here: tuple[str, ...], layer: str) -> None:
    """An adapter asked about a base that has given up a part of its weight to another one, at another rank."""
    make, _ = LAYERS[layer]
    for names in (("dora",), ("dora", "pissa"), ("vera", "dora")):
        torch.manual_seed(0)
        plain = nn.Sequential(make())
        adapter = Adapter.of(made(lorary.method(*names, r=2), make))
        expected = adapter.low_rank(plain)["0"]
        other = made(lorary.method(*here, r=3), make)
        found = adapter.low_rank(other)["0"]
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("here", ["embedding", "lm_head", ["embedding", "lm_head"]], ids=str)
def test_of_tied_tables_that_have_given_up_parts(here: Any) -> None:
    def tied() -> Any:
        return tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)

    model = tied()
    tables = ["embedding", "lm_head"]
    adapter = Adapter.of(tiny.trained(model, lorary.method("dora", r=2), tables))
    expected = adapter.low_rank(tied())
    other = tied()
    tiny.trained(other, lorary.method("pissa", r=3), here)
    found = adapter.low_rank(other)
    for name, form in expected.items():
        assert torch.equal(found[name].gain, form.gain)  # type: ignore[arg-type]
    lorary.detach(other)
    assert torch.equal(other.lm_head.weight, tied().lm_head.weight)


def test_a_weight_in_16_bits_is_taken_as_it_is_stored() -> None:
    def make() -> nn.Module:
        return nn.Linear(6, 4).bfloat16()

    torch.manual_seed(0)
    base = make()
    adapter = Adapter.of(made(lorary.method("dora", r=2), make))
    form = adapter.low_rank(nn.Sequential(base))["0"]
    V = base.weight.float() + form.B @ form.A
    torch.testing.assert_close(form.gain, adapter.tensors["0"]["m"] / V.norm(dim=1))


@pytest.mark.parametrize("names", [("lora",), ("dora",), ("pissa",), ("melora", "dora")], ids=" ".join)
def test_a_linear_layer_and_gpt_2s_are_the_same_matrix(names: tuple[str, ...]) -> None:
    """A plan or an adapter made on the one works on the other: attached, merged, and as a form."""
    for sides in ((6, 6), (4, 6)):
        torch.manual_seed(0)
        transposed, linear = nn.Sequential(Conv1D(*sides)), nn.Sequential(nn.Linear(*reversed(sides)))
        nn.init.normal_(transposed[0].weight)
        with torch.no_grad():
            linear[0].weight.copy_(transposed[0].weight.T)
            linear[0].bias.copy_(transposed[0].bias)
        for here, there in ((transposed, linear), (linear, transposed)):
            here, there = copy.deepcopy(here), copy.deepcopy(there)
            plain, x = copy.deepcopy(there), torch.randn(3, 6)
            before = there(x)
            method = lorary.method(*names, r=2)
            lorary.attach(there, lorary.plan(here, method, "0"))
            torch.testing.assert_close(there(x), before, rtol=1e-4, atol=1e-5)
            tiny.shaken(there)
            y, adapter = there(x).detach(), Adapter.of(there)
            form = adapter.low_rank(plain)["0"]
            torch.testing.assert_close(by_form(plain[0], x, form), y, rtol=1e-4, atol=1e-4)
            lorary.merge(there)
            torch.testing.assert_close(there(x), y, rtol=1e-4, atol=1e-4)
            lorary.switch(here, adapter, force=True)  # the same weights, another layout: another fingerprint
            torch.testing.assert_close(here(x), y, rtol=1e-4, atol=1e-4)
