"""The README is true: its code runs, its table is the registry, its tree is the tree, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lorary
from lorary.cli import COMMANDS
from lorary.cli.methods import FUNCTIONS
from tests import pages

README = pages.ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")

# The methods that lorary is made to hold.
MISSION = [
    *("LoRA", "QLoRA", "AdaLoRA", "LoRA+", "DoRA", "GLoRA", "LongLoRA", "S-LoRA", "LoRA-FA", "Delta-LoRA", "LoRAHub"),
    *("MELoRA", "MultiLoRA", "rsLoRA", "PiSSA", "O-LoRA", "OLoRA", "VeRA", "LoRA-drop", "BitFit"),
    *("full fine-tuning", "Houlsby adapters", "prefix tuning", "prompt tuning"),
]


def table() -> dict[str, str]:
    """Method -> status, from the README's table."""
    section = TEXT.split("## The methods")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.+\|$", section, re.MULTILINE)
    ]
    named = {re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", row[0]): row[-1] for row in rows[2:]}
    return {name: status for name, status in named.items() if name != "*baselines*"}


def test_every_block_of_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert pages.run(README) >= 4


def test_the_first_block_has_five_lines() -> None:
    first = next(block for block in pages.blocks(README) if block.language == "python")
    assert len([line for line in first.code.splitlines() if line]) == 5


def test_the_table_holds_every_method_of_the_mission() -> None:
    assert sorted(table()) == sorted(MISSION)


def test_the_table_tells_what_is_here() -> None:
    here = {match[1] for status in table().values() if (match := re.fullmatch(r"here: `([^`]+)`", status))}
    assert here == set(lorary.presets())
    functions = {m[1] for s in table().values() if (m := re.fullmatch(r"here, a function of a plan: `([^`]+)`", s))}
    assert functions == set(FUNCTIONS)
    assert {status for status in table().values() if not status.startswith("here")} == {"planned"}
    said = re.search(r"and (\w+) methods that combine", TEXT)
    assert said
    assert said[1] == {19: "nineteen"}.get(len(here | functions))


def test_the_table_cites_what_the_presets_cite() -> None:
    for preset in lorary.presets().values():
        paper = re.search(r"\d{4}\.\d{5}", preset.citation)
        row = next(line for line in TEXT.splitlines() if line.endswith(f"| here: `{preset.name}` |"))
        assert paper is None or paper[0] in row


def test_the_house_is_the_tree() -> None:
    drawn = TEXT.split("src/lorary/\n")[1].split("```")[0]
    drawn_here = set(re.findall(r"^  ([\w./]+)", drawn, re.MULTILINE))
    drawn_methods = set(re.findall(r"^    ([\w.]+)", drawn, re.MULTILINE))
    source = pages.ROOT / "src" / "lorary"
    packages = {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    assert drawn_here == packages | {path.name for path in source.glob("*.py")}
    assert drawn_methods == {path.name for path in (source / "methods").glob("*.py")} - {"__init__.py"}


def test_the_commands_are_the_commands() -> None:
    described = re.findall(r"^\| `lorary (\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(described) == sorted(COMMANDS)


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
