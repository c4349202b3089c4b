"""The pages that benchmarks write are those of the runs that are stored."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import pages


@pytest.mark.parametrize("arguments", [["benchmarks/claims", "--check"]], ids=" ".join)
def test_the_page_is_that_of_the_stored_runs(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_table_that_is_not_that_of_the_runs_is_noticed() -> None:
    """The page with a digit changed."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks/claims'); import report; from pathlib import Path\n"
        "page = Path('benchmarks/README.md'); table = report._parts(page)[1]\n"
        "assert report.difference(page, table) is None\n"
        "print(report.difference(page, table.replace('| 10, 10 |', '| 10, 11 |', 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pages.ROOT, capture_output=True, text=True, check=True)
    assert "+| LoRA+" in done.stdout
    assert "10, 11" in done.stdout
