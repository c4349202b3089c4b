"""The pages that benchmarks write are those of the runs that are stored."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorary
from lorary import builtin
from tests import pages


@pytest.mark.parametrize("arguments", [["benchmarks/claims", "--check"]], ids=" ".join)
def test_the_page_is_that_of_the_stored_runs(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=pages.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_base_with_biases_is_the_same_function_and_bitfit_trains_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(pages.ROOT / "benchmarks"))
    compared = importlib.import_module("compared")
    model = AutoModelForCausalLM.from_pretrained(compared.with_biases(tmp_path), dtype=torch.float32)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, builtin.load_model()(ids).logits)
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias")]
    assert not any(bias.any() for bias in biases)
    a_block = 192 + 96 + 96 + 192 + 576 + 576 + 192  # q, k, v, o; gate, up, down
    assert lorary.plan(model, lorary.method("bitfit")).trainable == sum(b.numel() for b in biases) == 6 * a_block


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
