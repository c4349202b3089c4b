"""Compression by the divergence of the outputs: the smallest adapter below the bound, which holds on unseen rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary import builtin
from lorary.adapters.compose.compression import Spectra
from lorary.analysis.merge_check import MergeCheck
from lorary.cli._comparison_rows import comparison_rows
from lorary.errors import DataError, LoraryError, MethodError, StateError
from tests.adapters.test_change_rank import base, trained


@pytest.fixture(scope="module")
def model() -> Any:
    return builtin.load_model()


@pytest.fixture(scope="module")
def rows(model: Any) -> list[Tensor]:
    found = comparison_rows(Path("no-run"), builtin.load_tokenizer(), model.config, 24)
    return [ids[:96] for ids in found.ids]


@pytest.fixture(scope="module")
def adapter(model: Any) -> lorary.Adapter:
    """Of rank 8 in every linear layer, with singular values that fall by half from one to the next."""
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=8), "all-linear"))
    made = lorary.Adapter.of(model)
    lorary.detach(model)
    generator = torch.Generator().manual_seed(0)
    for i, roles in enumerate(made.tensors.values()):
        for t, rows in ((roles["A"], roles["A"].shape[1]), (roles["B"].T, roles["B"].shape[0])):
            t.copy_(torch.linalg.qr(torch.randn(rows, 8, generator=generator)).Q.T)
        roles["B"].mul_(0.2 * (1 + i % 3) * 0.5 ** torch.arange(8))
    return made


def test_the_bound_holds_and_one_value_fewer_breaks_it(model: Any, rows: list[Tensor], adapter: lorary.Adapter) -> None:
    before = {name: p.clone() for name, p in model.state_dict().items()}
    seen: list[tuple[int, float]] = []
    found = lorary.compress(adapter, kl=0.01, model=model, rows=rows, progress=lambda *step: seen.append(step))
    d = found.divergence
    assert d is not None
    assert d.search <= 0.01
    assert d.check <= 0.01 * 1.2  # on rows that it has not seen
    assert d.tokens[0] + d.tokens[1] == sum(map(len, rows))
    kept = sum(found.ranks.values())
    tried = dict(seen)
    assert tried[kept] == d.search
    assert tried[max(count for count in tried if count < kept)] > 0.01
    assert kept - 1 in tried  # the bisection has closed in
    assert len(seen) <= 10
    assert len(set(found.ranks.values())) > 1
    assert 0.05 * found.before.parameters < found.after.parameters < 0.9 * found.before.parameters
    # the divergence is what MergeCheck measures between the two adapters
    reference = MergeCheck.of(lorary.switch(model, adapter), rows[1::2])
    assert reference.against(lorary.switch(model, found.adapter)).kl == pytest.approx(d.check)
    lorary.switch(model, None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    record = found.adapter.provenance
    assert record is not None
    assert record.settings == {"kl": 0.01, "error": found.error, "search": d.search, "check": d.check}
    assert f"KL(adapted || compressed) {d.search:.3g}" in str(found)
    assert found.to_dict()["divergence"]["bound"] == 0.01


def test_a_tighter_bound_keeps_more(model: Any, rows: list[Tensor], adapter: lorary.Adapter) -> None:
    few = rows[:4]
    sizes = [lorary.compress(adapter, kl=kl, model=model, rows=few).after.parameters for kl in (1.0, 0.001)]
    assert sizes[0] < sizes[1]
    one = lorary.compress(adapter, kl=100.0, model=model, rows=few)
    assert sum(one.ranks.values()) == 1  # an adapter adapts something
    assert len(Spectra.of(adapter).values) == 8 * len(adapter.sites)


def test_nothing_is_attached_after_an_error(model: Any, rows: list[Tensor], adapter: lorary.Adapter) -> None:
    with pytest.raises(MethodError, match=r"only rounded, already diverge by (.|\n)*raise the bound"):
        lorary.compress(adapter, kl=1e-30, model=model, rows=rows[:2])
    lorary.attach(model, lorary.plan(model, lorary.method("lora"), "attention"))  # possible: nothing was there
    with pytest.raises(StateError, match=r"has an adapter attached(.|\n)*lorary.detach it first"):
        lorary.compress(adapter, kl=0.1, model=model, rows=rows[:2])
    lorary.detach(model)


BAD: list[tuple[Any, Any, type[LoraryError], str]] = [
    ([torch.arange(4)], None, DataError, "kl needs at least 2 rows, one to search with and one to check; given: 1"),
    ([], None, DataError, "given: 0"),
    ("text", None, DataError, "rows: is a str, not a series of rows"),
    (7, None, DataError, "rows: is a int, not a series of rows"),
    (None, None, DataError, "rows: is a NoneType, not a series of rows"),
    ([["a"], [None]], None, DataError, """rows: holds ["a"], not token ids or the keyword arguments of a forward"""),
    ([[0.5], [1.0]], None, DataError, "rows: holds [0.5], not token ids"),
    ([torch.arange(4)] * 2, "model", MethodError, "model: is a str, not a torch.nn.Module"),
    ([torch.arange(4)] * 2, nn.Sequential(nn.Linear(2, 2)), LoraryError, "does not fit this model"),
]


@pytest.mark.parametrize(("given", "wrong", "kind", "sentence"), BAD, ids=[s for *_, s in BAD])
def test_bad_rows_and_models(given: Any, wrong: Any, kind: type[LoraryError], sentence: str) -> None:
    small, _ = trained("lora", targets=["plain"])
    with pytest.raises(kind) as caught:
        lorary.compress(small, kl=0.1, model=base() if wrong is None else wrong, rows=given)
    assert sentence in str(caught.value)
