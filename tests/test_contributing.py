"""CONTRIBUTING's worked example is true: its file is a method, the laws hold for it, and they notice if it is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pages

PAGE = pages.ROOT / "CONTRIBUTING.md"


def example() -> tuple[str, str]:
    """The worked file, and the code that uses it."""
    file, use = (block.code for block in pages.blocks(PAGE) if block.language == "python")
    return file, use


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A new Python that finds modules in `folder` first."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=pages.ROOT, env=env, capture_output=True, text=True, check=False
    )


def laws(folder: Path, file: str, chosen: str) -> subprocess.CompletedProcess[str]:
    """Runs the chosen laws with `file` as one method more."""
    (folder / "asymmetry.py").write_text(file, encoding="utf-8")
    return python(folder, "-m", "pytest", "-p", "asymmetry", "-p", "no:cacheprovider", "tests/laws", "-k", chosen)


def test_the_file_works_as_shown(tmp_path: Path) -> None:
    file, use = example()
    assert "src/lorary/methods/asymmetry.py" in PAGE.read_text(encoding="utf-8")
    (tmp_path / "asymmetry.py").write_text(file, encoding="utf-8")
    done = python(tmp_path, "-c", f"import asymmetry\n{use}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_laws_find_it_and_hold(tmp_path: Path) -> None:
    done = laws(tmp_path, example()[0], "[asymmetry- and float32")  # alone, on every kind of layer
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 50, done.stdout


@pytest.mark.slow
def test_the_laws_notice_a_mistake(tmp_path: Path) -> None:
    """B that does not start at zero moves the model at step 0."""
    wrong = example()[0].replace('nn.init.orthogonal_(p["A"]', 'nn.init.orthogonal_(p["B"]')
    assert wrong != example()[0]
    done = laws(tmp_path, wrong, "[asymmetry-linear-float32-nothing_moves")
    assert done.returncode == 1
    assert "nothing_moves_at_step_0" in done.stdout
