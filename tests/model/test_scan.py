"""The scan of a model: kinds, ties, heads and sizes from one walk over its module tree."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.model.scan import scan
from tests import tiny


class Tied(nn.Module):
    """Two linear layers with one weight, one layer under two paths, a norm, and attention that reads past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.again = self.first
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)


def test_modules_by_their_first_path() -> None:
    model = Tied()
    found = scan(model)
    paths = [path for path, _ in model.named_modules()]
    paths.insert(paths.index("attention.out_proj"), "attention.in_proj_weight")  # a parameter that is a layer
    assert list(found.modules) == paths
    first, out = found.modules["first"], found.modules["attention.out_proj"]
    assert (first.kind, first.quantised, first.why_not_adaptable) == ("linear", False, None)
    assert first.paths == ("first", "again")
    assert found.module("first") is model.first
    assert found.module("again") is None, "it has another first path"
    assert found.modules["norm"].kind is None
    assert found.modules["norm"].why_not_adaptable == "a LayerNorm has no weight matrix that lorary knows"
    assert (out.kind, out.owner, out.why_not_adaptable) == ("out_projection", "attention", None)
    assert list(found.layers) == ["first", "second", "attention.in_proj_weight", "attention.out_proj"]


def test_who_else_holds_a_weight() -> None:
    found = scan(Tied())
    assert found.modules["first"].tied_to == ("second.weight",)
    assert found.modules["second"].tied_to == ("first.weight",)
    assert found.modules["attention.out_proj"].tied_to == ()


def test_parameters_by_their_first_name() -> None:
    model = Tied()
    found = scan(model)
    assert {name: id(p) for name, p in found.parameters.items()} == {n: id(p) for n, p in model.named_parameters()}
    assert list(found.names) == [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert {name for name, first in found.names.items() if first == "first.weight"} == {
        "first.weight",
        "second.weight",
        "again.weight",
    }
    assert found.parameter("second.weight") is model.first.weight


def test_sizes_count_tied_parameters_once_and_a_quantised_weight_as_the_dense_one() -> None:
    plain = tiny.llama()
    numbers, size = scan(plain).sizes()
    assert (numbers, size) == (sum(p.numel() for p in plain.parameters()), 4 * numbers)
    quantised = lorary.quantize(copy.deepcopy(plain))
    found = scan(quantised)
    path = "model.layers.0.self_attn.q_proj"
    assert found.is_quantised(path)
    assert not found.is_quantised("lm_head")
    assert not found.is_quantised("nowhere")
    assert found.sizes()[0] == numbers
    assert found.sizes()[1] < size


def test_it_can_be_read() -> None:
    text = repr(scan(tiny.llama()).modules["lm_head"])
    assert text == ("ScannedModule(path='lm_head', kind='linear', quantised=False, paths=('lm_head',), tied_to=())")
    assert repr(scan(tiny.llama())) == "Scan(heads=frozenset({'lm_head'}))"


# --- walks -----------------------------------------------------------------------------------------------------------

_WALKS: Counter[str] = Counter()


class Counting(dict[str, Any]):
    """The children of a module, which count how often they are walked, whichever way."""

    def items(self) -> Any:
        _WALKS["items"] += 1
        return super().items()

    def values(self) -> Any:
        _WALKS["values"] += 1
        return super().values()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self._modules = Counting(self._modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(x))


@pytest.mark.parametrize(
    "words",
    [
        {"method": lorary.method("qlora", r=2), "ranks": {"1.proj": 1}},
        {"method": lorary.method("pissa", r=2, full=("norms",)), "exclude": ["blocks.7"]},
        {"method": lorary.method("bitfit")},
        {"method": lorary.method("delta-lora", r=2), "targets": ["proj", "blocks.1?.proj"]},
    ],
    ids=["qlora", "full", "bitfit", "delta-lora"],
)
def test_a_plan_walks_the_tree_once(words: dict[str, Any]) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(200))})
    _WALKS.clear()
    plan = lorary.plan(model, **words)
    assert plan.trainable
    assert _WALKS == {"items": 200}
