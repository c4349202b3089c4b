"""`lorary methods`: what it lists, and where its questions lead."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.cli.choosing import QUESTIONS, choose
from lorary.cli.methods import FUNCTIONS, PLANNED, table
from lorary.errors import MethodError
from lorary.train.config_file import load
from lorary.train.models import skeleton
from tests.cli.command import Command


def test_methods_shows_what_is_there_and_what_is_to_come(command: Command) -> None:
    rows = json.loads(command("methods", "--json").out)
    assert [row["name"] for row in rows if row["available"]] == [*lorary.presets(), *FUNCTIONS]
    assert {row["name"] for row in rows if not row["available"]} == set(PLANNED)
    assert not set(PLANNED) & set(lorary.presets())
    assert next(row for row in rows if row["name"] == "lora+") == {
        "name": "lora+",
        "available": True,
        "equation": "lr_B = ratio * lr_A",
        "year": 2024,
        "citation": "Hayou et al. 2024, arXiv:2402.12354",
        "changes": ["how fast each part learns"],
        "when": lorary.presets()["lora+"].when,
        "say": "lora+",
        "options": {"ratio": 16.0},
        "lr": 1e-4,
        "numbers": 16 * (4096 + 4096),
        "bytes": 16 * 16 * (4096 + 4096),
    }
    assert all(row["year"] or row["name"] == "full" for row in rows)


def test_methods_as_text(command: Command) -> None:
    ran = command("methods")
    expected = """dora (2024)
    y = diag(m) (W + s B A) x / ||W + s B A|| + b
    When quality counts for more than the time of a step; half of LoRA's rank is often enough.
    Liu et al. 2024, arXiv:2402.09353
    changes: how it joins the weight
    trains: 135,168 numbers beside a weight of 4096 x 4096; 2.06 MiB with gradients, AdamW and rules
    options: exact=False
"""
    assert expected in ran.out
    assert "lorahub (2023, planned)\n" in ran.out
    assert "full (the baseline)\n" in ran.out
    assert ran.err == f"{len(lorary.presets()) + len(FUNCTIONS)} methods, {len(PLANNED)} planned\n"


def test_one_method(command: Command) -> None:
    ran = command("methods", "DoRA")
    assert ran.out.startswith("dora (2024)\n")
    assert len(ran.out.splitlines()) == 7
    (row,) = json.loads(command("methods", "--json", "lorahub").out)
    assert not row["available"]
    ran = command("methods", "adalor")
    assert (ran.code, ran.out) == (2, "")
    assert "adalor: is no method that lorary knows\n      hint: did you mean `adalora`" in ran.err


def test_a_method_that_is_a_function_tells_how_it_is_said(command: Command) -> None:
    ran = command("methods", "lora-drop")
    said = "say: method: {drop: {threshold: 0.9}} in a configuration, or lorary.drop_layers(plan, importance)"
    assert said in " ".join(ran.out.split())
    for name in FUNCTIONS:
        with pytest.raises(MethodError, match="is none itself"):
            lorary.method(name)


def test_what_a_method_takes_in_training() -> None:
    size = {row["name"]: (row["numbers"], row["bytes"]) for row in table()}
    n = 4096 + 4096
    assert size["lora"] == (16 * n, 16 * 16 * n)
    assert size["lora-fa"] == (8 * n, 16 * 8 * n + 4 * 8 * n)
    assert size["pissa"] == (16 * n, 16 * 16 * n + 4 * 16 * n)  # where it started is kept
    assert size["vera"] == (4096 + 256, 16 * (4096 + 256))  # what all layers share is not the layer's
    assert size["delta-lora"] == (16 * n, 16 * 16 * n + 4 * (16 * n + 1))  # the product of step K, and lambda
    smoothed = 2 * 4 * 12 * (n + 1)  # the scores are two more numbers for each, until the choice stands
    assert size["adalora"] == (12 * (n + 1), 16 * 12 * (n + 1) + smoothed)
    assert size["full"] == size["bitfit"] == size["lora-drop"] == (None, None)


def every_answer() -> Iterator[dict[str, str]]:
    for answers in itertools.product(*(question.answers for question in QUESTIONS)):
        yield dict(zip([question.key for question in QUESTIONS], answers, strict=True))


def test_every_outcome_is_a_configuration_that_plans(tmp_path: Path) -> None:
    outcomes = {choose(answers).yaml(): answers for answers in every_answer()}
    file, bare = tmp_path / "chosen.yaml", None
    plans: set[str] = set()
    named: set[str] = set()
    for text, answers in outcomes.items():
        file.write_text(text)
        config = load(file)
        named |= set(config.method.name)
        bare = bare or skeleton(config.model)
        planned = str(config.method)
        if planned not in plans:
            plans.add(planned)
            assert config.method.plan(bare).trainable > 0, answers
        assert text.startswith("# Why: ")
    assert named == {
        *("lora", "lora+", "lora-fa", "qlora", "dora", "glora", "pissa", "vera", "multilora", "adalora", "o-lora"),
        "longlora",
    }


def test_every_answer_counts() -> None:
    """Each answer but a question's first changes what comes out: nothing that is asked is passed over."""
    plain = choose({}).yaml()
    for question in QUESTIONS:
        for answer in list(question.answers)[1:]:
            assert choose({question.key: answer}).yaml() != plain, (question.key, answer)


def test_what_is_planned_is_said() -> None:
    for answers, name in (({"adapters": "many"}, "S-LoRA"),):
        assert name in "\n".join(choose(answers).planned)
        assert name.lower() in PLANNED
    assert choose({"quality": "best", "convergence": "fast"}).planned == []
    assert choose({"layers": "differ", "tasks": "sequence"}).planned == []


def test_layers_that_differ_find_out_as_the_other_answers_allow() -> None:
    def said(**answers: str) -> tuple[list[str], dict[str, Any]]:
        found = choose(answers)
        return found.names, found.method

    assert said(layers="differ") == (["adalora"], {})
    assert said(layers="search") == (["glora"], {"options": {"supernet": True}})
    assert said(layers="differ", memory="tight") == (["lora-fa"], {"drop": {"threshold": 0.9}})
    assert said(layers="differ", convergence="fast")[1] == {"r": 16, "ranks": {"*.mlp.*": 32}}
    assert said(tasks="sequence", memory="tight") == (["o-lora", "lora-fa"], {"options": {"hard": True}})
    assert said(tasks="sequence", quality="best", convergence="fast")[0] == ["o-lora", "lora+"]


def test_answers_on_the_command_line(command: Command) -> None:
    ran = command("methods", "--answers", "quality=best, convergence=fast")
    assert (ran.code, ran.err) == (0, "")
    assert "\n  name:\n  - dora\n  - pissa\n" in ran.out
    Path("chosen.yaml").write_text(ran.out)
    assert command("plan", "chosen.yaml").code == 0


def test_questions_on_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("rather tight\ntight\n" + "\n" * (len(QUESTIONS) - 1)))
    ran = command("methods", "--choose")
    assert ran.code == 0
    assert ran.out == choose({"memory": "tight"}).yaml()
    assert ran.err.count("memory [enough]: ") == 2
    assert all(question.text in ran.err for question in QUESTIONS)


def test_an_end_of_the_input_ends_the_questions(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("tight\n"))
    ran = command("methods", "--choose")
    assert (ran.code, ran.out) == (1, "")


def test_answers_that_are_none(command: Command) -> None:
    ran = command("methods", "--answers", "memori=tight,quality=bestest")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: invalid answers:\n"
        "  - memori: is no question\n"
        "      hint: did you mean `memory`?\n"
        "  - quality: 'bestest' is no answer to: Is the best result worth longer steps?\n"
        "      hint: known: good, best\n"
    )
    ran = command("methods", "--answers", "memory,quality=best,quality=good")
    assert ran.code == 2
    assert "--answers: 'memory' has no answer" in ran.err
    assert "--answers: 'quality' is answered twice" in ran.err
