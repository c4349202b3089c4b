"""lorary lorahub: from adapter folders and a file of examples to a mixture, its card and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import lorary
from lorary import builtin
from tests import tiny
from tests.cli.command import Command

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = [{"prompt": f"def double_{i}(x):\n", "completion": f"Return {i} times x."} for i in range(5)]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Command(monkeypatch, capsys)


def save(*names: str, base: Any = None, **options: Any) -> None:
    """Adapters of the built-in base, each in a run folder of its name."""
    model = base or builtin.load_model()
    for seed, name in enumerate(names):
        lorary.attach(model, lorary.plan(model, lorary.method("lora", **{"r": 2} | options), "attention-qv"))
        lorary.save(tiny.shaken(model, 0.01, seed), Path(name) / "adapter")
        lorary.detach(model)


def test_a_mixture_is_searched_and_saved_with_its_card_and_report(command: Command) -> None:
    save("code", "prose")
    ran = command("lorahub", "code", "prose", "-e", "rows.jsonl", "--out", "mixed", "--budget", "7", "--l1", "0")
    assert (ran.code, ran.out) == (0, "mixed\n"), ran.err
    record = json.loads(Path("mixed/lorahub.json").read_text())
    assert len(record["tried"]) == 7
    base = record["loss_of_base"]
    assert record["tried"][0] == {"weights": [0.0, 0.0], "loss": base, "objective": base}
    assert f"loss {record['loss']:.4f} on 5 examples, {base:.4f} of the base alone; 7 can" in ran.err
    mixed = lorary.load_adapter("mixed")
    assert mixed.provenance is not None
    assert [(p.name, p.weight) for p in mixed.provenance.parents] == list(record["weights"].items())
    assert mixed.provenance.settings["l1"] == 0
    model = lorary.load(builtin.load_model(), "mixed")
    ids = torch.tensor([builtin.load_tokenizer()(ROWS[0]["prompt"])["input_ids"]])
    code, prose = (lorary.load_adapter(f"{name}/adapter") for name in ("code", "prose"))
    expected = lorary.switch(builtin.load_model(), lorary.mix([code, prose], [*record["weights"].values()]))
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    page = Path("mixed/lorahub.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert f"{record['loss']:.4f}" in page
    card = ModelCard.load(Path("mixed/README.md"))
    assert card.data.to_dict()["model_name"] == "mixed"
    assert "By lorahub: form product" in card.text


def test_json_and_the_paper_s_form(command: Command) -> None:
    save("code", "prose")
    ran = command(
        "lorahub", "code", "prose", "-e", "rows.jsonl", "--out", "mixed", "--budget", "4", "--form", "factor",
        "--limit", "2", "--bound", "0.5", "--json",
    )  # fmt: skip
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "mixed")
    assert json.loads(ran.out)["settings"]["bounds"] == [-0.5, 0.5]
    assert {a.r for a in lorary.load_adapter("mixed").sites} == {2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("code", "code"), 2, "code: is named more than once\n      hint: name every adapter once"),
        (("code", "nothing"), 4, "nothing"),
        (("code", "other", "--form", "factor"), 2, "has rank 3, and rank 2 in code: the factors do not add"),
        (("code", "--form", "sum"), 2, "form: is 'sum'\n      hint: known: factor, product"),
        (("code", "--bound", "0"), 2, "bounds: is (-0.0, 0.0); give the least and the greatest weight"),
        (("code", "-e", "missing.jsonl"), 3, "missing.jsonl"),
        (("code", "-e", "empty.jsonl"), 3, "empty.jsonl"),
        (
            ("code", "-e", "many.jsonl"),
            3,
            "has 1,001 rows, and every candidate reads all of them\n      hint: pass",
        ),
        (("code", "--max-length", "8"), 3, "rows are longer than data.max_length (8 tokens)"),
        (("other_base",), 2, "other weights: "),
    ],
)
def test_bad_input_writes_nothing(command: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    save("code")
    save("other", r=3)
    if "other_base" in arguments:
        changed = builtin.load_model()
        with torch.no_grad():
            changed.model.norm.weight.add_(1)
        save("other_base", base=changed)
    Path("empty.jsonl").write_text("")
    Path("many.jsonl").write_text("".join(json.dumps(ROWS[0]) + "\n" for _ in range(1001)))
    examples = () if "-e" in arguments else ("-e", "rows.jsonl")
    ran = command("lorahub", *arguments, *examples, "--out", "mixed", "--budget", "3")
    assert ran.code == code, ran.err
    assert message in ran.err
    assert not Path("mixed").exists()


def test_a_folder_with_files_is_refused_before_the_work(command: Command) -> None:
    save("code")
    Path("mixed").mkdir()
    Path("mixed/notes.txt").write_text("mine")
    ran = command("lorahub", "code", "-e", "rows.jsonl", "--out", "mixed")
    assert ran.code == 4
    assert [p.name for p in Path("mixed").iterdir()] == ["notes.txt"]
