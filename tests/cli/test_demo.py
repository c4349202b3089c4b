"""The demo, shortened to a few steps: what it claims is what is in its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lorary import builtin
from lorary.builtin import corpora
from lorary.cli._demo import report, run
from lorary.cli._demo.folder import clear_folder
from lorary.cli.demo import demo
from lorary.errors import DataError, FileError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]  # one run serves them all


@pytest.fixture(scope="module", autouse=True)
def _a_part_of_the_held_out_text() -> Iterator[None]:
    """The three evaluations of so short a demo would take far longer than its training."""
    load = corpora.load

    def shortened(name: str, split: str, **options: bool) -> list[corpora.Record]:
        records = load(name, split, **options)
        return records[::32] if split == "validation" else records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "load", shortened)
        patch.setitem(run.SAMPLING, "max_new_tokens", 8)
        yield


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> run.DemoResult:
    folder = tmp_path_factory.mktemp("demo")
    made = run.run_demo(folder, steps=6)
    report.write_report(made, folder / "report.html")
    return made


def test_it_learns(found: run.DemoResult) -> None:
    assert found.after < 0.97 * found.before
    assert math.isfinite(found.after)


def test_the_perplexities_are_those_of_the_models(found: run.DemoResult) -> None:
    """Measured again from what lies in the folder: the merged model, read by Transformers alone."""
    rows = run._held_out_rows(builtin.load_tokenizer(), found.data)
    merged = AutoModelForCausalLM.from_pretrained(found.folder / "merged", dtype=torch.float32)
    assert run._perplexity(merged, rows) == pytest.approx(found.after, rel=1e-4)
    assert run._perplexity(builtin.load_model(), rows) == pytest.approx(found.before, rel=1e-6)
    assert found.before != pytest.approx(found.after, rel=1e-2)


def test_reloaded_and_merged_are_the_trained_model(found: run.DemoResult) -> None:
    assert found.reloaded == 0.0
    assert 0.0 < found.merged < 1e-5 * found.largest


def test_the_merged_folder_is_a_plain_model(found: run.DemoResult) -> None:
    with safe_open(found.folder / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names
    assert not [name for name in names if ".params." in name or "lora" in name or ".base." in name]
    assert not list((found.folder / "merged").glob("*adapter*"))


def test_the_page_says_what_was_found(found: run.DemoResult) -> None:
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert f"{found.before:.1f} → {found.after:.1f}" in page
    assert f"{found.plan.trainable:,}" in page
    assert f"{found.merged:.1e}" in page
    assert "<td>model.layers.*.self_attn.q_proj</td><td>192 × 192</td>" in page
    assert "lorary train my.yaml" in page
    assert page.count("<svg") == 1
    assert not re.search(r"<script|<link|<img|@import", page)
    machine = str(found.folder.parent.parent)
    assert page.count(machine) == page.count(str(found.folder)) > 0, "no path but the one that the user gave"


def test_the_curve_is_the_log(found: run.DemoResult) -> None:
    lines = (found.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(found.history)
    assert {record["step"] for record in found.history if "eval_loss" in record} == {0, 3, 6}


def test_it_is_told_on_the_terminal(found: run.DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    report.print_report(found, found.folder / "report.html")
    told = capsys.readouterr().out
    assert f"{found.before:.1f} → {found.after:.1f}" in told
    assert (found.folder / "report.html").as_uri() in told
    assert "lorary init my.yaml" in told
    assert "\x1b" not in told, "no colours where there is no terminal"


def test_only_what_a_demo_made_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("from the last demo")
    (tmp_path / "report.html").write_text("old")
    clear_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(FileError, match=r"holds files that are not from a demo: thesis\.tex") as refused:
        demo(out=tmp_path, steps=2)
    assert "--out" in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "report.html"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(FileError, match="is a file"):
        demo(out=tmp_path / "demo", steps=2)


def test_prose_where_there_are_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run._choose_data() == "builtin:c-headers"
    load = corpora.load

    def without_headers(name: str, split: str, **options: bool) -> list[corpora.Record]:
        if name == "builtin:c-headers":
            raise DataError("there are no headers here")
        return load(name, split, **options)

    monkeypatch.setattr(corpora, "load", without_headers)
    assert run._choose_data() == "builtin:topics"
