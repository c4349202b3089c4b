"""Every law, over every preset and legal pair x kind of layer x dtype."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary import sites
from lorary.methods.adalora import Spectral
from lorary.methods.glora import Supports
from lorary.methods.lora import Kaiming
from lorary.methods.melora import Minis

from . import laws
from .cases import KINDS, Case, methods, possible

METHODS = methods()
DTYPES = [torch.float32, torch.bfloat16]
CASES = [
    pytest.param(case, id=f"{name}-{kind.name}-{str(dtype)[6:]}")
    for (name, method), kind, dtype in itertools.product(METHODS.items(), KINDS, DTYPES)
    if possible(case := Case(method, kind, dtype))
]


@pytest.mark.parametrize("case", CASES)
def test_every_law_holds(case: Case, tmp_path: Path) -> None:
    laws.hold(case, tmp_path / "adapter")


def graphs() -> list[Any]:
    """The cases of single presets that compile to graphs of their own: where a method starts, its scale and its rates
    are numbers in the graph of another one; each such preset is compiled on one kind."""
    seen, cases = set(), []
    for case in CASES:
        method, kind, dtype = (subject := case.values[0]).method, subject.kind, subject.dtype
        if not any(method is METHODS[name] for name in lorary.presets()) or dtype != torch.float32:
            continue
        graph = (method.delta, method.join, method.frozen, method.full, method.rules, kind.name)
        if graph not in seen or kind.name == "linear":
            cases.append(case)
        seen.add(graph)
    return cases


@pytest.mark.parametrize("case", graphs())
def test_compiles_whole(case: Case) -> None:
    laws.compiles_whole(case)


def test_every_preset_is_covered_on_every_kind_or_says_why() -> None:
    covered = {(id(p.values[0].method), p.values[0].kind.name) for p in CASES}
    missing = {
        (name, kind.name)
        for name, method in METHODS.items()
        for kind in KINDS
        if (id(method), kind.name) not in covered
    }
    without_bias = {k.name for k in KINDS if getattr(k.make(), "bias", None) is None}
    embeddings = {k.name for k in KINDS if k.name.startswith("embedding")}
    expected = {("bitfit", k) for k in without_bias}
    for name, method in METHODS.items():
        if "A" in method.frozen and isinstance(method.init, Kaiming):  # an embedding starts with A = 0
            expected |= {(name, k) for k in embeddings}
        if "bias" in method.full:
            expected |= {(name, k) for k in without_bias}
        if isinstance(method.delta, Minis):
            odd = {k.name for k in KINDS if any(size % method.delta.n for size in (k.inp, *(k.adapted or (k.out,))))}
            expected |= {(name, k) for k in odd}
        if isinstance(method.delta, Spectral):  # there is one budget for each layer
            expected |= {(name, k.name) for k in KINDS if k.adapted}
        if method.context is not None:  # a layer alone has no positions: see tests/papers/test_longlora.py
            expected |= {(name, k.name) for k in KINDS}
        if not method.storage.writable:  # linear layers alone are packed
            expected |= {(name, k.name) for k in KINDS if k.name.startswith(("conv", "embedding"))}
        if isinstance(method.join, Supports):  # over all rows of a weight, and over its bias
            expected |= {(name, k.name) for k in KINDS if k.adapted or k.name in embeddings}
    assert missing == expected


def test_the_kinds_are_all_kinds() -> None:
    assert {sites.kind_of(kind.make()) for kind in KINDS} == set(sites.KINDS)
