"""Folders in which comparisons are asked for: rows, a configuration, records of comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Comparison
from lorary.train.compare.asked import from_config
from lorary.train.compare.ledger import identity
from lorary.train.compare.request import make_request
from lorary.train.config.load import from_dict

START = """\
model: builtin:base
data: {train: rows.jsonl, validation_split: 0.5}
training: {max_steps: 4}
"""


def fill(folder: Path, text: str = START) -> None:
    """Write rows, a configuration, and folders that cannot be compared in."""
    rows = [{"prompt": f"def f{i}(x): ", "completion": f"return {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.py").write_text("def f(completions, **_):\n    return [0.0 for _ in completions]\n")
    (folder / "c.yaml").write_text(text)
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    for name in ("damaged", "strange", "done"):
        (folder / name).mkdir()
    (folder / "damaged" / "comparison.json").write_text("{")
    begin(folder / "done")
    found = store.read(folder / "done" / "comparison.json")
    store.write(dataclasses.replace(found, settings={}), folder / "strange" / "comparison.json")


def begin(folder: Path) -> None:
    """The record of a comparison of which nothing has been run."""
    data = {"train": str(folder.parent / "rows.jsonl"), "validation_split": 0.5}
    asked = from_config(
        from_dict(
            {
                "model": "builtin:base",
                "data": data,
                "training": {"max_steps": 4},
                "compare": {"methods": "lora,dora"},
            }
        )
    )
    request = make_request(asked.config, asked.arms, asked.settings, folder)
    store.write(Comparison({"request": identity(request)}, "sft", request.arms), folder / "comparison.json")
