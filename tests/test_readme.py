"""The README: its code runs, its table is the registry, its rooms are the rooms, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import import_graph

import lorary
from lorary.cli import COMMANDS
from lorary.spec.presets import FUNCTIONS
from tests import pages

README = pages.ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def section() -> str:
    return TEXT.split("## The methods")[1].split("\n## ")[0]


def test_every_block_of_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pages.run(README) >= 4


def test_the_first_block_has_five_lines() -> None:
    first = next(block for block in pages.blocks(README) if block.language == "python")
    assert len([line for line in first.code.splitlines() if line]) == 5


def test_it_is_read_in_five_minutes() -> None:
    before, _, after = TEXT.split("<!-- The methods; written by docs/generate.py. -->")
    assert len((before + after).splitlines()) <= 133  # the table of methods is looked up, not read


def test_the_table_is_the_registry() -> None:
    """Its rows are written by docs/generate.py; `test_docs.py` finds them out of date."""
    named = re.findall(r"^\| \[`([^`]+)`\]\([^)]+\) \| `[^`]+` \|$", section(), re.MULTILINE)
    assert named == [*lorary.presets(), *FUNCTIONS]


def test_the_rooms_are_the_rooms_in_their_order() -> None:
    drawn = TEXT.split("src/lorary/\n")[1].split("```")[0]
    names = re.findall(r"^  (\w+)(?:/|\.py) ", drawn, re.MULTILINE)
    assert names == list(import_graph.ROOMS)
    page = (pages.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE) == names


def test_the_commands_are_the_commands() -> None:
    (described,) = re.findall(r"^The commands: ((?:`\w+`,?\s)+)", TEXT, re.MULTILINE)
    assert sorted(re.findall(r"\w+", described)) == sorted(COMMANDS)


PAGES = [
    README,
    pages.ROOT / "CONTRIBUTING.md",
    pages.ROOT / "SECURITY.md",
    *sorted((pages.ROOT / "docs").rglob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(target)
    assert broken == []
