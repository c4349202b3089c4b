"""lorary mix: folders in, one folder out, exact or with its error shown; and nothing written where it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.adapters.label_names import read_label_names, write_label_names
from tests.cli.command import Command
from tests.cli.test_commands import base
from tests.tiny import shaken


@pytest.fixture(autouse=True)
def adapters(command: Command) -> None:
    """`code`, a LoRA; `runs/chat/adapter`, a VeRA; `dora`; all on `model`."""
    base(Path("model"))
    for folder, names in {"code": ["lora"], "runs/chat/adapter": ["vera"], "dora": ["dora"]}.items():
        model = plain()
        lorary.attach(model, lorary.plan(model, lorary.method(*names, r=4), "attention"))
        lorary.save(shaken(model, seed=len(folder)), folder)


def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)


def test_a_weighted_sum_is_exact(command: Command) -> None:
    ran = command("mix", "code", "runs/chat", "--weights", "0.7,-0.3", "--out", "both")
    assert (ran.code, ran.out, ran.err) == (0, "both\n", "exact: rank 8\n")
    code, chat = lorary.load_adapter("code"), lorary.load_adapter("runs/chat/adapter")
    found, expected = lorary.load_adapter("both"), lorary.mix([code, chat], [0.7, -0.3])
    assert content_hash(found) == content_hash(expected)
    parents: Any = found.provenance.parents  # type: ignore[union-attr]
    assert [(p.name, p.weight) for p in parents] == [("code", 0.7), ("runs/chat", -0.3)]
    assert lorary.attached(lorary.load(plain(), "both")) is not None


def test_a_negative_first_weight_is_no_option(command: Command) -> None:
    assert command("mix", "code", "runs/chat", "--weights", "-1,1", "--out", "both").code == 0


def test_a_merge_of_elements_shows_its_errors(command: Command) -> None:
    ran = command("mix", "code", "runs/chat", "--how", "ties", "--density", "0.5", "--rank", "4", "--out", "both")
    assert (ran.code, ran.out) == (0, "both\n")
    note, title, head, *rows = ran.err.splitlines()
    told: Any = lorary.load_adapter("both").provenance.settings  # type: ignore[union-attr]
    assert note.startswith(f"note: an approximation: the update is off by {told['error']:.2%}")
    assert title == "the layers with the largest errors"
    assert head.split() == ["layer", "rank", "error", "/", "||dW||"]
    assert len(rows) == 8 + 1
    assert rows[-1].split() == ["together", "4", f"{told['error']:.2%}"]
    errors = [float(row.split()[2].rstrip("%")) for row in rows[:-1]]
    assert errors == sorted(errors, reverse=True)


def test_dora_is_refused_and_approximated(command: Command) -> None:
    ran = command("mix", "code", "dora", "--out", "both")
    assert ran.code == 2
    assert "dora gives its output a gain or a shift of its own (MagnitudeDirection)" in ran.err
    assert "--approximate --base" in ran.err
    assert not Path("both").exists()
    ran = command("mix", "code", "dora", "--approximate", "--base", "model", "--rank", "16", "--out", "both", "--json")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert (record["how"], record["out"], record["settings"]["approximate"]) == ("sum", "both", True)
    assert [p["name"] for p in record["parents"]] == ["code", "dora"]
    assert 0 < record["settings"]["error"] < 0.5
    assert set(record["ranks"].values()) == {16}


def test_labels_go_along_and_must_agree(command: Command) -> None:
    write_label_names(Path("code"), ["bad", "good"], None)
    assert command("mix", "code", "runs/chat", "--out", "both").code == 0
    labels = read_label_names(Path("both"))
    assert labels is not None
    assert labels.names == ("bad", "good")
    write_label_names(Path("runs/chat/adapter"), ["good", "bad"], None)
    ran = command("mix", "code", "runs/chat", "--out", "other")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err == (
        "error: cannot mix classifiers of different labels:\n"
        "  - code: its labels are bad, good\n  - runs/chat: its labels are good, bad\n"
    )


BAD: dict[str, tuple[tuple[str, ...], int, str]] = {
    "a word": (("code", "runs/chat", "--weights", "1,x"), 2, "--weights: 'x' is not a number"),
    "twice": (("code", "code"), 2, "code: is named 2 times\n      hint: name it once, with the sum of its weights"),
    "too few": (("code", "runs/chat", "-w", "1"), 2, "weights: has 1 numbers for 2 adapters"),
    "not finite": (("code", "runs/chat", "-w", "1,inf"), 2, "weights[1]: is inf, not a finite number"),
    "no adapter": (("code", "model"), 4, "cannot mix model:\n  - model: there is no adapter in it"),
    "a way": (("code", "runs/chat", "--how", "dare_ties"), 2, "did you mean `dare-ties`"),
    "density of a sum": (("code", "runs/chat", "--density", "0.5"), 2, "density: has no effect with sum"),
    "rank and energy": (("code", "runs/chat", "--rank", "2", "--energy", "0.5"), 2, "rank or energy: one of them says"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_and_nothing_is_written(case: str, command: Command) -> None:
    arguments, code, sentence = BAD[case]
    before = sorted(Path().rglob("*"))
    ran = command("mix", *arguments, "--out", "both")
    assert (ran.code, ran.out) == (code, "")
    assert sentence in ran.err
    assert sorted(Path().rglob("*")) == before


def test_an_adapter_is_not_written_over(command: Command) -> None:
    before = Path("code/lorary.json").read_bytes()
    ran = command("mix", "code", "runs/chat", "--out", "code")
    assert (ran.code, ran.out) == (4, "")
    assert Path("code/lorary.json").read_bytes() == before


def test_a_truncated_file_is_refused(command: Command) -> None:
    file = Path("code/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-40])
    ran = command("mix", "code", "runs/chat", "--out", "both")
    assert ran.code == 4
    assert not Path("both").exists()
