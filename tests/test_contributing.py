"""CONTRIBUTING's worked example is true: its file is a method, the laws hold for it, and they notice if it is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts import import_graph

from lorary.spec import interfaces
from lorary.spec.calibration import CalibratedInit
from tests import fresh, pages

pytestmark = pytest.mark.xdist_group(fresh.GROUP)
PAGE = pages.ROOT / "CONTRIBUTING.md"


def example() -> tuple[str, str]:
    """The worked file, and the code that uses it."""
    file, use = (block.code for block in pages.blocks(PAGE) if block.language == "python")
    return file, use


def python(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """A new Python that finds modules in `folder` first: its exit status and what it prints."""
    return fresh.Program(*arguments, folder=pages.ROOT, beside=folder, path=folder).ended()


def laws(folder: Path, file: str, chosen: str) -> tuple[int, str]:
    """Runs the chosen laws with `file` as one method more."""
    (folder / "lora_xs.py").write_text(file, encoding="utf-8")
    tests = ["-p", "no:cacheprovider", "tests/laws/test_laws.py", "--laws=all", "-k", chosen]
    tests += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that a library has brought along
    return python(folder, "-m", "pytest", "-p", "lora_xs", *tests)[:2]


def test_the_file_works_as_shown(tmp_path: Path) -> None:
    file, use = example()
    assert "src/lorary/methods/lora_xs.py" in PAGE.read_text(encoding="utf-8")
    (tmp_path / "lora_xs.py").write_text(file, encoding="utf-8")
    status, _, errors = python(tmp_path, "-c", f"import lora_xs\n{use}")
    assert status == 0, errors


@pytest.mark.parametrize(
    "protocol",
    [
        interfaces.Delta,
        interfaces.Join,
        interfaces.Init,
        CalibratedInit,
        interfaces.Rule,
        interfaces.Storage,
        interfaces.Scale,
    ],
)
def test_the_table_lists_all_members_of_each_protocol(protocol: type) -> None:
    """And nothing else."""
    members = {name for name in {*vars(protocol), *protocol.__annotations__} if not name.startswith("_")}
    shown = {interfaces.Delta: "what is trained", interfaces.Join: "how it joins", interfaces.Init: "where it starts"}
    shown |= {CalibratedInit: "a start that reads data"}
    shown |= {interfaces.Rule: "what happens", interfaces.Storage: "how the weight", interfaces.Scale: "its size"}
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {shown[protocol]}")]
    must, may = row.split("|")[3:5]
    named = set(re.findall(r"`(\w+)", must + may))
    assert named - {"add", "Fused", "Init"} == members


def test_every_question_leads_to_a_file_in_its_room() -> None:
    rows = re.findall(r"^\| [^|]+\? \| ([^|]*) \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {room for rooms, _ in rows for room in re.findall(r"`(\w+)`", rooms)} == set(import_graph.ROOMS) - {
        "builtin",
        "errors",
    }
    for rooms, files in rows:
        paths = re.findall(r"`([^`]+)`", files)
        assert [path for path in paths if not (import_graph.SOURCE / path).exists()] == []
        assert {import_graph.room(path.replace("/", ".")) for path in paths} <= {
            *re.findall(r"`(\w+)`", rooms),
            "errors",
        }


@pytest.mark.slow
def test_the_laws_find_it_and_hold(tmp_path: Path) -> None:
    status, printed = laws(tmp_path, example()[0], "[lora-xs- and float32")  # alone, on every kind of layer
    assert status == 0, printed
    assert int(printed.split(" passed")[0].split()[-1]) > 15, printed


@pytest.mark.slow
def test_the_laws_notice_a_mistake(tmp_path: Path) -> None:
    """R that does not start at zero moves the model at step 0."""
    wrong = example()[0].replace('params["R"].zero_()', 'params["R"].fill_(0.1)')
    assert wrong != example()[0]
    status, printed = laws(tmp_path, wrong, "law_holds and [lora-xs-linear-float32")
    assert status == 1
    assert "the law: nothing_moves_at_step_0" in printed
