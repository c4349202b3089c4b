"""lorary advise, lorary plan --advise and lorary init with advice."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorary.train.config.load import load
from tests.cli.command import Command

DATA = "data.train=[{path: builtin:docstrings, limit: 40}]"


def test_advise_prints_settings_with_reasons(command: Command) -> None:
    ran = command("advise", "builtin:base", "builtin:docstrings", "--set", DATA, "--set", "method.r=8")
    assert ran.code == 0
    assert "method.targets" in ran.out
    assert "all-linear\n    attention alone learns less at equal parameters" in ran.out
    assert "Yours; 32 is advised." in ran.out
    assert "\nwarning   " in ran.out
    assert "note: builtin:docstrings: 40 rows in the format prompt-completion (detected)" in ran.err
    assert not list(Path().iterdir())


def test_advise_in_json(command: Command) -> None:
    found = json.loads(command("advise", "builtin:base", "builtin:docstrings", "--set", DATA, "--json").out)
    assert found["config"]["method"]["targets"] == ["all-linear"]
    assert {one["key"] for one in found["recommendations"]} >= {"training.lr", "method.r", "method.alpha", "task"}
    assert found["facts"]["rows"] == 40


def test_init_writes_the_advised_configuration(command: Command) -> None:
    ran = command("init", "my.yaml", "--model", "builtin:base", "--data", "builtin:docstrings", "--set", DATA)
    assert ran.code == 0
    assert ran.err.endswith("wrote my.yaml; try it with: lorary train my.yaml --dry-run\n")
    written = load("my.yaml")
    assert written.method.targets == ("all-linear",)
    assert "    # -> attention alone" not in Path("my.yaml").read_text()
    assert "  # -> attention alone learns less at equal parameters" in Path("my.yaml").read_text()
    advised = command("advise", "my.yaml")
    assert advised.code == 0
    assert "is advised" not in advised.out  # what is written is what is advised
    compared = command("compare", "my.yaml", "--methods", "lora,ia3", "--dry-run")
    assert compared.code == 0, compared.err
    assert compared.out.startswith("To compare")
    assert "methods are judged after their last step: training.keep_best left out\n" in compared.out


def test_plan_shows_the_advised_run(command: Command) -> None:
    ran = command("plan", "builtin:base", "--advise", "--data", "builtin:docstrings", "--set", DATA, "--r", "8")
    assert ran.code == 0
    assert "Yours; 32 is advised." in ran.out
    assert "trains    175,104 of" in ran.out
    assert "peak in training" in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("advise", "builtin:base"), 2, "data: no data are named, and they decide"),
        (("advise", "my.yaml", "builtin:docstrings"), 2, "use --set data.train=builtin:docstrings"),
        (("advise", "absent.yaml"), 2, "absent.yaml"),
        (("advise", "builtin:bass", "builtin:docstrings"), 4, "did you mean `builtin:base`?"),
        (("advise", "builtin:base", "builtin:docstring"), 3, "did you mean `builtin:docstrings`"),
        (("advise", "builtin:base", "builtin:docstrings", "--ranks", "gradients"), 2, "--ranks: `gradients` is unknown\n      hint: did you mean `gradient`?"),
        (("advise", "builtin:base", "builtin:docstrings", "--set", "training.lr=fast"), 2, "--set training.lr"),
        (("advise", "builtin:base", ""), 2, "data: `data.train[0]` is empty"),
        (("advise", "", "builtin:docstrings"), 2, "model: `model` is empty"),
        (("advise", "builtin:base", "builtin:docstrings", "--memory", "0"), 2, "Input should be greater than or equal to 0.1"),
        (("advise", "builtin:base", "builtin:docstrings", "--memory", "nan"), 2, "Invalid value for '--memory'"),
        (("plan", "builtin:base", "--advise", "--data", "absent.jsonl"), 3, "cannot read absent.jsonl:\n  - there is no such file or folder"),
        (("plan", "./absent", "--advise", "--data", "builtin:docstrings"), 4, "./absent: there is no such folder"),
        (("init", "my.yaml", "--model", "builtin:base", "--data", "absent.jsonl"), 3, "cannot read absent.jsonl:"),
        (("init", "my.yaml", "--model", "builtin:base"), 2, "--data: is not named, and advice needs it"),
        (("init", "my.yaml", "--memory", "24"), 2, "--model: is not named, and advice needs it"),
        (("plan", "builtin:base", "--data", "builtin:docstrings"), 2, "--data: only advice reads data here\n      hint: use it with --advise"),
        (("plan", "builtin:base", "--advise"), 2, "data: no data are named, and they decide"),
    ],
)  # fmt: skip
def test_bad_requests(command: Command, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    ran = command(*arguments)
    assert ran.code == code
    assert sentence in ran.err
    assert ran.out == ""
    assert not list(Path().iterdir())
