"""The rule that says whether adapters train faster together, beside the measurements that it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorary.train.shared_base.speed import MOST_TOKENS, faster_together

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "shared_base.json"


def test_the_rule_is_that_of_the_measurements() -> None:
    steps = json.loads(RESULTS.read_text())["steps"]
    assert len(steps) > 10
    for step in steps:
        together = step["in_turn_over_together"][1] > 1
        assert faster_together(step["adapters"], step["rows"] * step["length"]) is together, step


@pytest.mark.parametrize(
    ("adapters", "tokens", "device"),
    [(1, 16, "cpu"), (8, MOST_TOKENS + 1, "cpu"), (8, 0, "cpu"), (8, 16, "cuda"), (8, 16, "meta")],
)
def test_what_was_not_measured_is_not_claimed(adapters: int, tokens: int, device: str) -> None:
    assert not faster_together(adapters, tokens, device)
