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
from lorary.cli._method_chooser import QUESTIONS, choose
from lorary.cli.methods import table
from lorary.errors import MethodError
from lorary.model.loading.from_pretrained import skeleton
from lorary.spec.presets import FUNCTIONS, PRESETS, Preset
from lorary.train.config.load import load
from tests.cli.command import Command


def test_methods_shows_every_preset(command: Command) -> None:
    rows = json.loads(command("methods", "--json").out)
    assert [row["name"] for row in rows] == [*lorary.presets(), *FUNCTIONS]
    assert next(row for row in rows if row["name"] == "lora+") == {
        "name": "lora+",
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
    When quality matters more than the time of a step; half of LoRA's rank is often enough.
    Liu et al. 2024, arXiv:2402.09353
    changes: how it joins the weight
    trains: 135,168 parameters for a 4096 x 4096 weight; 2.06 MiB with gradients, AdamW and rules
    options: exact=False
"""
    assert expected in ran.out
    assert "full (the baseline)\n" in ran.out
    assert ran.err == f"{len(lorary.presets()) + len(FUNCTIONS)} methods\n"


def test_one_method(command: Command) -> None:
    ran = command("methods", "DoRA")
    assert ran.out.startswith("dora (2024)\n")
    assert len(ran.out.splitlines()) == 7
    (row,) = json.loads(command("methods", "--json", "lora-drop").out)
    assert row["equation"].startswith("g_l = sum over x of |s B_l A_l x_l|^2")
    ran = command("methods", "adalor")
    assert (ran.code, ran.out) == (2, "")
    assert "adalor: not found\n      hint: did you mean `adalora`" in ran.err


def test_the_page_of_a_method(command: Command) -> None:
    page = command("methods", "dora", "--markdown").out
    for heading in ("# DoRA\n", "## Options\n", "## What trains\n", "## Combines with\n"):
        assert heading in page
    assert "[arXiv:2402.09353](https://arxiv.org/abs/2402.09353)" in page
    ran = command("methods", "--markdown")
    assert (ran.code, ran.out) == (2, "")
    assert "NAME: is missing" in ran.err
    ran = command("methods", "lora-drop", "--markdown")
    assert (ran.code, ran.out) == (2, "")
    assert "lora-drop: is a function, not a preset; its page is written by hand" in ran.err


def test_a_method_that_is_a_function_tells_how_it_is_said(command: Command) -> None:
    ran = command("methods", "lora-drop")
    said = " ".join(ran.out.split())
    assert "use: `drop: {threshold: 0.9}` under `method:` in a configuration, or call lorary.drop_layers" in said
    for name, what in (("lora-drop", "it chooses layers"), ("LoRAHub", "it mixes adapters that are trained already")):
        with pytest.raises(MethodError, match=f"is not a method: {what}"):
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
    for answers in itertools.product(*(question.answers for question in QUESTIONS.values())):
        yield dict(zip(QUESTIONS, answers, strict=True))


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
        assert text.startswith("# ")
    assert named == {
        *("lora", "lora+", "lora-fa", "qlora", "dora", "glora", "pissa", "vera", "multilora", "adalora", "o-lora"),
        "longlora",
    }


def test_every_answer_counts() -> None:
    """Each answer but a question's first changes what comes out: nothing that is asked is passed over."""
    plain = choose({}).yaml()
    for key, question in QUESTIONS.items():
        for answer in list(question.answers)[1:]:
            assert choose({key: answer}).yaml() != plain, (key, answer)


def test_answers_lead_to_methods_that_combine() -> None:
    def said(**answers: str) -> tuple[list[str], dict[str, Any]]:
        found = choose(answers)
        return found.names, {key: value for key, value in found.method.items() if key != "name"}

    assert said() == ([], {})
    assert said(layers="differ") == (["adalora"], {})
    assert said(layers="search") == (["glora"], {"options": {"supernet": True}})
    assert said(layers="search", memory="short")[1] == {"options": {"A": "vector", "supernet": True}}
    assert said(layers="differ", memory="tight") == (["lora-fa"], {"drop": {"threshold": 0.9}})
    assert said(layers="differ", quality="best") == (["dora"], {})  # neither AdaLoRA nor LoRA-drop
    assert said(tasks="sequence", memory="tight") == (["o-lora", "lora-fa"], {"options": {"hard": True}})
    assert said(tasks="sequence", quality="best", convergence="fast")[0] == ["o-lora", "lora+"]
    assert said(memory="short", quality="best", convergence="fast")[0] == ["qlora", "dora", "pissa"]
    assert said(memory="tight", quality="best")[0] == ["lora-fa"]  # it combines, but is not advised


def test_the_reasons_are_the_presets_own_words() -> None:
    lines = " ".join(choose({"memory": "tight", "quality": "best", "convergence": "fast"}).yaml().split("\n#   "))
    assert f"# LoRA-FA: {PRESETS['lora-fa'].when}" in lines
    assert f"# Not DoRA: {PRESETS['dora'].restrictions['lora-fa'].why}." in lines
    assert "LoRA+" not in lines  # which LoRA-FA excludes, and PiSSA is there
    assert f"# LoRA: {PRESETS['lora'].when}" in choose({}).yaml()


def test_a_method_from_outside_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(seed: int = 0) -> dict[str, Any]:
        return {"frozen": frozenset({"A"})}

    mine = Preset("mine", words, "nobody 2026", when="For one's own.", answers={"adapters=many": {"seed": 3}})
    monkeypatch.setitem(PRESETS, "mine", mine)
    found = choose({"adapters": "many"})
    assert found.names == ["mine"]
    assert found.options == {"seed": 3}
    assert found.reasons == [f"{mine.title}: For one's own."]


def test_every_answer_of_a_preset_is_asked_for() -> None:
    asked = {f"{key}={answer}" for key, question in QUESTIONS.items() for answer in list(question.answers)[1:]}
    assert asked == {a for found in (*PRESETS.values(), *FUNCTIONS.values()) for a in found.answers}


def test_answers_on_the_command_line(command: Command) -> None:
    ran = command("methods", "--answers", "quality=best, convergence=fast")
    assert (ran.code, ran.err) == (0, "")
    assert "\n  name:\n  - dora\n  - pissa\n" in ran.out
    Path("chosen.yaml").write_text(ran.out)
    assert command("plan", "chosen.yaml").code == 0


def test_questions_on_the_terminal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\nrather tight\ntight\n" + "\n" * (len(QUESTIONS) - 3)))
    ran = command("methods", "--choose")
    assert ran.code == 0
    assert ran.out == choose({"memory": "tight"}).yaml()
    assert ran.err.count("memory [enough]: ") == 2
    assert all(question.text in ran.err for question in QUESTIONS.values())


def test_an_end_of_the_input_ends_the_questions(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("tight\n"))
    ran = command("methods", "--choose")
    assert (ran.code, ran.out) == (1, "")


def test_answers_that_are_none(command: Command) -> None:
    ran = command("methods", "--answers", "memori=tight,quality=bestest")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: invalid answers:\n"
        "  - memori: is not a question\n"
        "      hint: did you mean `memory`?\n"
        "  - quality: 'bestest' does not answer: Is the best result worth longer steps?\n"
        "      hint: known: good, best\n"
    )
    ran = command("methods", "--answers", "memory,quality=best,quality=good")
    assert ran.code == 2
    assert "--answers: 'memory' has no answer" in ran.err
    assert "--answers: 'quality' is answered twice" in ran.err
