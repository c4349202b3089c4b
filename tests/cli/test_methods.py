"""`lorary methods`: what it lists, and where its questions lead."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorary
from lorary.cli.choosing import QUESTIONS, choose
from lorary.cli.methods import PLANNED
from lorary.train.config_file import load
from lorary.train.models import skeleton
from tests.cli.command import Command


def test_methods_shows_what_is_there_and_what_is_to_come(command: Command) -> None:
    rows = json.loads(command("methods", "--json").out)
    assert [row["name"] for row in rows if row["available"]] == list(lorary.presets())
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
        "options": {"ratio": 16.0},
        "lr": 1e-4,
    }
    assert all(row["year"] or row["name"] == "full" for row in rows)


def test_methods_as_text(command: Command) -> None:
    ran = command("methods")
    expected = """dora (2024)
    y = diag(m) (W + s B A) x / ||W + s B A|| + b
    When quality counts for more than the time of a step; half of LoRA's rank is often enough.
    Liu et al. 2024, arXiv:2402.09353
    changes: how it joins the weight
    options: exact=False
"""
    assert expected in ran.out
    assert "qlora (2023, planned)\n" in ran.out
    assert "full (the baseline)\n" in ran.out
    assert ran.err == f"{len(lorary.presets())} methods, {len(PLANNED)} planned\n"


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
    assert named == {"lora", "lora+", "lora-fa", "dora", "glora", "pissa", "vera", "multilora"}


def test_every_answer_counts() -> None:
    """Each answer but a question's first changes what comes out: nothing that is asked is passed over."""
    plain = choose({}).yaml()
    for question in QUESTIONS:
        for answer in list(question.answers)[1:]:
            assert choose({question.key: answer}).yaml() != plain, (question.key, answer)


def test_what_is_planned_is_said() -> None:
    for answers, name in (
        ({"memory": "short"}, "QLoRA"),
        ({"layers": "differ"}, "AdaLoRA"),
        ({"context": "long"}, "LongLoRA"),
        ({"adapters": "many"}, "S-LoRA"),
        ({"tasks": "sequence"}, "O-LoRA"),
    ):
        assert name in "\n".join(choose(answers).planned)
        assert name.lower() in PLANNED
    assert choose({"quality": "best", "convergence": "fast"}).planned == []


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
        "error: these answers cannot be read:\n"
        "  - memori: is no question\n"
        "      hint: did you mean `memory`?\n"
        "  - quality: 'bestest' is no answer to: Is the best result worth longer steps?\n"
        "      hint: known: good, best\n"
    )
    ran = command("methods", "--answers", "memory,quality=best,quality=good")
    assert ran.code == 2
    assert "--answers: 'memory' has no answer" in ran.err
    assert "--answers: 'quality' is answered twice" in ran.err
