"""Every law, over every preset and legal pair x kind of layer x dtype.

A covering selection of these cases, unless `--laws=all` says otherwise: `make laws`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import lorary
from lorary.layers import kinds
from lorary.methods.adalora import SVDDelta
from lorary.methods.glora import GLoRAJoin
from lorary.methods.houlsby import Bottleneck
from lorary.methods.lora import Kaiming
from lorary.methods.lora_ga import GradientInit
from lorary.methods.melora import BlockDiagonal
from lorary.methods.miss import SharedShards
from lorary.methods.token_rows import TokenRows
from lorary.spec.calibration import CalibratedInit
from lorary.spec.site import PROJECTIONS

from . import laws
from .cases import KINDS, Case, methods, possible
from .cover import Value, cover, pairs

METHODS = methods()
DTYPES = [torch.float32, torch.bfloat16]
CASES = {
    (name, kind.name, str(dtype)[6:]): case
    for (name, method), kind, dtype in itertools.product(METHODS.items(), KINDS, DTYPES)
    if possible(case := Case(method, kind, dtype))
}


def values(names: tuple[str, str, str]) -> set[Value]:
    """The presets of a case, its kind of layer and its dtype."""
    method, kind, dtype = names
    return {("kind", kind), ("dtype", dtype), *(("preset", name) for name in method.split("+"))}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrises the tests of the laws with the cases that `--laws` asks for."""
    every = metafunc.config.getoption("laws") == "all"
    if metafunc.function is test_every_law_holds:
        chosen = list(CASES) if every else cover({names: values(names) for names in CASES})
    elif metafunc.function is test_compiles_whole:
        chosen = [names for names in graphs() if every or names[1] == "linear" or names[0] in ("lora", "dora")]
    else:
        return
    metafunc.parametrize("case", [pytest.param(CASES[names], id="-".join(names)) for names in chosen])


def test_every_law_holds(case: Case, tmp_path: Path) -> None:
    laws.hold(case, tmp_path / "adapter")


def graphs() -> list[tuple[str, str, str]]:
    """The cases of single presets that compile to graphs of their own: where a method starts, its scale and its rates
    are numbers in the graph of another one; each such preset is compiled on one kind."""
    seen, cases = set(), []
    for (name, kind, dtype), case in CASES.items():
        if name not in lorary.presets() or dtype != "float32":
            continue
        method = case.method
        graph = (method.delta, method.join, method.frozen, method.full, method.rules, kind)
        if graph not in seen or kind == "linear":
            cases.append((name, kind, dtype))
        seen.add(graph)
    return cases


def test_compiles_whole(case: Case) -> None:
    laws.compiles_whole(case)


def test_every_preset_is_covered_on_every_kind_or_says_why() -> None:
    covered = {(name, kind) for name, kind, _ in CASES}
    missing = {(name, kind.name) for name in METHODS for kind in KINDS} - covered
    without_bias = {k.name for k in KINDS if getattr(k.make(), "bias", None) is None}
    embeddings = {k.name for k in KINDS if k.name.startswith("embedding")}
    expected = {("bitfit", k) for k in without_bias}
    for name, method in METHODS.items():
        if "A" in method.frozen and isinstance(method.init, Kaiming):  # an embedding starts with A = 0
            expected |= {(name, k) for k in embeddings}
        if "bias" in method.full:
            expected |= {(name, k) for k in without_bias}
        if method.join is not None and method.join.changes_bias:  # an embedding has no bias
            expected |= {(name, k) for k in embeddings}
        if isinstance(method.delta, BlockDiagonal):
            odd = {k.name for k in KINDS if any(size % method.delta.n for size in (k.inp, *(k.adapted or (k.out,))))}
            expected |= {(name, k) for k in odd}
        if isinstance(method.delta, SharedShards):  # sums of the inputs of linear layers
            expected |= {(name, k.name) for k in KINDS if k.name.startswith(("conv", "embedding"))}
        if isinstance(method.delta, SVDDelta):  # there is one budget for each layer
            expected |= {(name, k.name) for k in KINDS if k.adapted}
        if method.context is not None:  # a layer alone has no positions: see tests/papers/test_longlora.py
            expected |= {(name, k.name) for k in KINDS}
        if not method.storage.writable:  # linear layers alone are packed
            expected |= {(name, k.name) for k in KINDS if k.name.startswith(("conv", "embedding"))}
        if isinstance(method.join, Bottleneck) or name == "ia3 of inputs":  # outputs, or inputs, of linear layers
            expected |= {(name, k.name) for k in KINDS if k.adapted or k.name.startswith(("conv", "embedding"))}
        if isinstance(method.join, TokenRows):  # embeddings and heads have rows of tokens
            expected |= {(name, k.name) for k in KINDS if k.name.startswith(("GPT-2", "fused", "conv"))}
        if isinstance(method.init, CalibratedInit) and method.init.reads == "inputs":  # of linear layers
            expected |= {(name, k.name) for k in KINDS if k.name.startswith(("conv", "embedding"))}
        if isinstance(method.init, GradientInit):  # 2 r directions
            expected |= {(name, k.name) for k in KINDS if min(k.inp, *(k.adapted or (k.out,))) < 6}
        if isinstance(method.join, GLoRAJoin):  # over all rows of a weight, and over its bias
            expected |= {(name, k.name) for k in KINDS if k.adapted or k.name in embeddings}
        if (
            isinstance(method.join, (Bottleneck, GLoRAJoin, TokenRows))  # no form for experts yet
            or (isinstance(method.init, CalibratedInit) and method.init.reads == "inputs")
            or not method.storage.writable
            or method.context is not None
            or name == "delta-lora, written"
        ):
            expected |= {(name, k.name) for k in KINDS if k.experts > 1}
        join, init = method.join, method.init
        if (join and join.roles | join.uses) or (init and init.residual_init):  # of the matrix of each expert
            expected |= {(name, k.name) for k in KINDS if k.sharing == "shared"}
    assert missing == expected


def test_the_kinds_are_all_kinds() -> None:
    """But for the projections of nn.MultiheadAttention, whose laws are in tests/layers/test_multihead_attention.py."""
    planned = {name: case.planned.sites[0].site.kind for (lora, name, _), case in CASES.items() if lora == "lora"}
    assert set(planned.values()) == set(kinds.KINDS) - set(PROJECTIONS)


def missed(chosen: Iterable[tuple[str, str, str]]) -> set[tuple[Value, ...]]:
    """Pairs of a preset, a kind, a dtype or another preset that occur in some case, and in none of these."""
    here, everywhere = (set().union(*(pairs(values(names)) for names in cases)) for cases in (chosen, CASES))
    return everywhere - here


def test_the_selection_covers_every_pair() -> None:
    chosen = cover({names: values(names) for names in CASES})
    assert missed(chosen) == set()
    assert len(chosen) < len(CASES) / 4


def test_a_hole_in_the_selection_is_noticed() -> None:
    chosen = cover({names: values(names) for names in CASES})
    without = [names for names in chosen if names[0] != "dora+pissa"]
    assert (("preset", "dora"), ("preset", "pissa")) in missed(without)
    fewer = {names for names in chosen if names[1] != "conv3d" or "dora" not in names[0].split("+")}
    assert missed(fewer) >= {(("kind", "conv3d"), ("preset", "dora"))}
