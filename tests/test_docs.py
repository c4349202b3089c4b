"""The pages: every block of Python runs, every preset has its page, and the whole builds without a warning."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import lorary
from lorary.analysis.comparison import store
from lorary.analysis.comparison.statistics import findings
from lorary.analysis.comparison.words import verdict
from lorary.cli import app
from lorary.spec.presets import FUNCTIONS
from tests import comparisons, pages
from tests.cli.command import Command

DOCS = pages.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# page with other people's trainers -> what these warn of themselves: names that they will drop, pinned memory on a CPU
_OLD_NAMES = "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"
_PINNED = "ignore:'pin_memory' argument is set as true:UserWarning"
_LIGHTNING = "ignore:`isinstance.treespec, LeafSpec.` is deprecated"
FOREIGN = {
    "how-to/in-your-own-trainer.md": (_OLD_NAMES, _PINNED, _LIGHTNING),
    "how-to/other-tasks.md": (_PINNED,),
}


def name(page: Path) -> str:
    return str(page.relative_to(DOCS))


def marked(page: Path) -> Any:
    """The page, marked as slow if it trains, and tolerant of what other people's trainers warn of themselves."""
    slow = {"tutorial.md", "how-to/large-models.md", "how-to/long-context.md", "how-to/look-inside.md", *FOREIGN}
    marks = [pytest.mark.slow] if name(page) in slow else []
    marks += [pytest.mark.filterwarnings(of_others) for of_others in FOREIGN.get(name(page), ())]
    return pytest.param(page, marks=marks)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES], ids=name)
def test_every_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = Command(monkeypatch, capsys)

    def lorary(*arguments: str) -> None:
        ran = command(*arguments)
        assert ran.code == 0, f"$ lorary {shlex.join(arguments)}\n{ran.err}"

    pages.run(page, lorary)


def lines() -> Iterator[tuple[str, list[str]]]:
    """Every `$ lorary ...` line of every page, those that are not run here included."""
    for page in [*PAGES, pages.ROOT / "README.md"]:
        for block in pages.blocks(page):
            if block.language == "console":
                for arguments in pages.commands(block):
                    yield f"{page.name}:{block.line}", arguments


@pytest.mark.parametrize(("where", "arguments"), [pytest.param(*line, id=shlex.join(line[1])) for line in lines()])
def test_every_command_is_one(where: str, arguments: list[str]) -> None:
    known = typer.main.get_command(app()).commands  # type: ignore[attr-defined]
    assert arguments[0] in known, where
    with contextlib.suppress(typer.Exit, SystemExit):  # `--help` ends after it has been read
        known[arguments[0]].make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize(
    "page", [*PAGES, pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_every_block_says_its_language(page: Path) -> None:
    known = {"python", "console", "text", "yaml", "json", "toctree", "{toctree}", "toml", "bibtex"}
    unknown = [f"{page.name}:{b.line}: {b.language!r}" for b in pages.blocks(page) if b.language not in known]
    fences = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert unknown == []
    assert len(fences) % 2 == 0


def test_every_preset_has_a_page() -> None:
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for preset in lorary.presets().values():
        file = preset.name.replace("+", "-plus") + ".md"
        page = (DOCS / "methods" / file).read_text(encoding="utf-8")
        assert f"({file})" in index, f"methods/index.md does not lead to {file}"
        for heading in ("## Options", "## What trains", "## Combines with", "## Use"):
            assert heading in page, f"{file} has no {heading!r}"
        arxiv = re.search(r"\d{4}\.\d{5}", preset.citation)
        assert arxiv is None or arxiv[0] in page, f"{file} does not cite {preset.citation}"
        for option in preset.parameters:
            assert f"`{option}`" in page, f"{file} does not mention the option {option}"


def test_every_method_page_is_of_a_preset() -> None:
    known = {preset.replace("+", "-plus") for preset in lorary.presets()} | {"index", *FUNCTIONS}
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == known


def test_every_method_that_is_a_function_has_a_page() -> None:
    index = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    for name, function in FUNCTIONS.items():
        page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        assert f"({name}.md)" in index
        assert f"| when | {function.when} |" in page
        arxiv = re.search(r"\d{4}\.\d{5}", function.citation)
        assert arxiv
        assert arxiv[0] in page


def test_every_preset_says_what_its_page_shows() -> None:
    for preset in lorary.presets().values():
        assert set(preset.meanings) == set(preset.parameters), f"{preset.name} does not explain its options"
        assert preset.when.endswith("."), f"{preset.name} does not say when to use it"
        assert preset.changes, preset.name
        title = re.sub(r"[ ()]", "", preset.title.lower()).replace("³", "3")
        assert title.startswith(preset.name[:4]), preset.title


def test_every_public_name_is_documented() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    missing = [word for word in lorary.__all__ if f"`{word}" not in page and f"lorary.{word}" not in page]
    assert missing == []


def test_the_generated_pages_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))  # generate.py imports what lies beside it
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == page(), f"docs/{name} is out of date: make docs"


def test_counts_by_layers_are_those_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/numbers.md counts one plan's sites by their names; here each row has a plan with its own targets."""
    monkeypatch.syspath_prepend(str(DOCS))
    from numbers_page import RANKS, TARGETS, llama

    page = (DOCS / "numbers.md").read_text(encoding="utf-8")
    for words, targets in TARGETS.items():
        plan = lorary.plan(llama("Llama-3.2-1B"), lorary.method("lora", r=16), targets)
        (row,) = re.findall(rf"^\| Llama-3.2-1B \| {re.escape(words)} \|(.*)\|$", page, re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[RANKS.index(16)] == f"{plan.trainable:,}"
        assert cells[-1] == f"{100 * plan.share:.2f} %"


def test_a_stored_comparison_has_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables, its verdict, and the command that repeats it."""
    monkeypatch.syspath_prepend(str(DOCS))
    import compared_page

    run = {"config": "training: {batch_size: 4}", "rows": {"validation": 32, "test": 120}, "command": "repeat it"}
    found = comparisons.comparison()
    store.write(dataclasses.replace(found, settings={**found.settings, **run}), tmp_path / "ranks.json")
    monkeypatch.setattr(compared_page, "RECORDS", tmp_path)
    page = compared_page.compared_page()
    section = page.partition("## Which rank\n")[2].partition("\n## ")[0]
    assert "## Which layers" not in page  # there is no record of it
    assert "120 steps of 4 rows each" in section
    assert "`repeat it`" in section
    assert all(f"| {arm.name} |" in section for arm in found.arms)
    assert "no difference shown" in section
    assert verdict(findings(found)) in section


def test_every_correction_names_a_test_that_exists() -> None:
    """Each row of docs/corrections.md says which test shows it."""
    page = (DOCS / "corrections.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| often said")]
    named = [re.fullmatch(r"\|.*\| `([\w/]+\.py)::(\w+)` \|", row) for row in rows]
    assert len(rows) >= 60
    assert [row for row, found in zip(rows, named, strict=True) if found is None] == []
    missing = [
        f"{found[1]}::{found[2]}"
        for found in named
        if found
        and not re.search(rf"^def {found[2]}\(", (pages.ROOT / "tests" / found[1]).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fetched = [
        f"{html.name}: {target}"
        for html in (tmp_path / "html").glob("**/*.html")
        for target in re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', html.read_text(encoding="utf-8")
        )
    ]
    assert fetched == [], "a page fetches something"
