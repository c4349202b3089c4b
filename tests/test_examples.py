"""Every example runs as a reader would run it, offline, and shows what it says it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import fresh, pages

FOLDER = pages.ROOT / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py"))


pytestmark = pytest.mark.xdist_group(fresh.GROUP)


def output(name: str, folder: Path) -> str:
    (folder / "here").mkdir()
    program = fresh.Program(str(FOLDER / name), folder=folder / "here", strict=True)
    status, printed, errors = program.ended()
    assert status == 0, errors
    assert list((folder / "here").iterdir()) == [], "an example leaves nothing behind"
    return printed


def test_there_is_a_test_for_every_example() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f'output("{name}"' not in here] == []


@pytest.mark.slow
def test_plain_pytorch(tmp_path: Path) -> None:
    printed = output("plain_pytorch.py", tmp_path)
    before = float(re.search(r"([\d.]+) right", printed)[1])
    after = float(re.search(r"error ([\d.]+) on the right", printed)[1])
    assert after < before / 10
    bases = re.findall(r"error ([\d.]+) on the left", printed)
    assert len(bases) == 2
    assert bases[0] == bases[1], "the base is what it was"
    assert float(printed.split("up to ")[1]) < 1e-5


@pytest.mark.slow
def test_transformers_model(tmp_path: Path) -> None:
    printed = output("transformers_model.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_switch_tasks(tmp_path: Path) -> None:
    printed = output("switch_tasks.py", tmp_path)
    rows = {row[0]: (float(row[1]), float(row[2])) for row in map(str.split, printed.splitlines()[1:])}
    assert list(rows) == ["base", "c", "prose", "both"]
    assert rows["c"][0] < rows["base"][0], "the C adapter is better at C"
    assert rows["prose"][1] < rows["base"][1], "the prose adapter is better at prose"
    assert rows["both"] not in (rows["base"], rows["c"], rows["prose"])


@pytest.mark.slow
def test_qlora(tmp_path: Path) -> None:
    printed = output("qlora.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    assert "42 layers" not in printed, "nothing is left to pack: it was loaded packed"
    assert float(re.search(r"together +[\d.]+% +([\d.]+)%", printed)[1]) < 5
    assert float(re.search(r"top-1 agrees at ([\d.]+)%", printed)[1]) > 95
