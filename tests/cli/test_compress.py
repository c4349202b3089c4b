"""lorary compress: a folder, what was lost, and nothing written where it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorary
from lorary import builtin
from tests.adapters.test_change_rank import trained
from tests.cli.command import Command


def test_by_rank_and_by_energy(command: Command) -> None:
    adapter = trained("pissa", targets=["plain", "conv"])[0]
    lorary.save_adapter(adapter, "run/adapter")
    ran = command("compress", "run", "--rank", "2", "--out", "small")
    assert (ran.code, ran.out) == (0, "small\n")
    assert ran.err == f"{lorary.compress(adapter, rank=2)}\n"
    small = lorary.load_adapter("small")
    assert small.provenance is not None
    assert small.provenance.parents[0].name == "run"
    record = json.loads(command("compress", "run", "--energy", "0.9", "--out", "again", "--json").out)
    assert record["error"] ** 2 <= 0.1
    assert record["before"]["ranks"] == [4, 4]
    assert record["ranks"].keys() == {"plain", "conv"}


def test_by_divergence_on_given_rows(command: Command) -> None:
    model = builtin.load_model()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4), "attention-qv"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    lorary.save(model, "adapter")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"def f{i}(x): return x"}) + "\n" for i in range(4)))
    ran = command("compress", "adapter", "--kl", "0.1", "--data", "rows.jsonl", "--out", "small")
    assert ran.code == 0, ran.err
    assert "note: compared on 4 rows of rows.jsonl" in ran.err
    assert "KL(adapted || compressed)" in ran.err.splitlines()[-1]
    lorary.load(builtin.load_model(), "small")


REFUSED = [
    (("adapter", "--out", "small"), 2, "rank, energy or kl: one of them says how much to keep; given: none"),
    (("adapter", "--rank", "2", "--energy", "0.5", "--out", "small"), 2, "given: rank, energy"),
    (("adapter", "--energy", "0", "--out", "small"), 2, "energy: is 0.0, not a share"),
    (("adapter", "--rank", "2", "--out", "adapter"), 4, "the folder is not empty: it holds 'adapter_config.json'"),
    (("adapter", "--rank", "2", "--out", "file"), 4, "a file of this name is in the way"),
    (("nothing", "--rank", "2", "--out", "small"), 4, "cannot compress nothing"),
    (("adapter", "--kl", "0.1", "--base", "no-model/here/at-all", "--out", "small"), 4, "cannot load the model"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), REFUSED, ids=[s for *_, s in REFUSED])
def test_nothing_is_written_where_it_is_refused(
    arguments: tuple[str, ...], code: int, sentence: str, command: Command
) -> None:
    lorary.save_adapter(trained("lora", targets=["plain"])[0], "adapter")
    Path("file").write_text("")
    before = sorted(Path().rglob("*"))
    ran = command("compress", *arguments)
    assert ran.code == code, ran.err
    assert sentence in ran.err
    assert sorted(Path().rglob("*")) == before
