"""lorary extract: a folder that loads on the base, the table, and nothing written where it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import lorary
from tests.adapters.compose.test_extract import loaded, merged, outputs
from tests.cli.command import Command


def test_an_adapter_is_written_and_fits_the_base(command: Command) -> None:
    y = merged("LlamaForCausalLM", Path())
    ran = command("extract", "base", "tuned", "--rank", "8", "--sites", "3", "--out", "adapter")
    assert (ran.code, ran.out) == (0, "adapter\n")
    lines = ran.err.splitlines()
    assert lines[0] == "14 layers adapted with rank 8: their change is off by 0.00% in the Frobenius norm"
    assert lines[-1] == "and 11 more"
    base = lorary.load(loaded(Path("base"), "LlamaForCausalLM"), "adapter")
    assert float((outputs(base) - y).abs().max()) < 1e-5
    arguments = ("base", "tuned", "--energy", "0.5", "--targets", "q_proj", "--targets", "v_proj", "--json")
    record = json.loads(command("extract", *arguments, "--out", "small").out)
    assert {s["site"].rpartition(".")[2] for s in record["sites"]} == {"q_proj", "v_proj"}
    assert len(record["left_out"]) == 10
    assert 0 < record["error"] <= 0.5**0.5


def test_nothing_is_written_where_it_is_refused(command: Command) -> None:
    merged("LlamaForCausalLM", Path())
    before = sorted(Path().rglob("*"))
    for arguments, code, sentence in (
        (("base", "base", "--rank", "2", "--out", "new"), 4, "all parameters are equal in both checkpoints"),
        (("base", "tuned", "--out", "new"), 2, "one of them says how much to keep"),
        (("base", "nothing/at/all", "--rank", "2", "--out", "new"), 4, "there is no such folder"),
        (("base", "tuned", "--rank", "2", "--out", "tuned"), 4, "the folder is not empty: it holds 'config.json'"),
        (("base", "tuned", "--rank", "2", "--targets", "q_porj", "--out", "new"), 2, "q_proj"),
    ):
        ran = command("extract", *arguments)
        assert ran.code == code, ran.err
        assert sentence in ran.err
        assert sorted(Path().rglob("*")) == before
