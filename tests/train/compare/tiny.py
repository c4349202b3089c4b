"""Comparisons that take seconds: the tiny Llama of `tests.train.runs`, 24 questions, six steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lorary.analysis.comparison.record import Arm, Comparison
from lorary.train.compare.compare import compare
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict
from tests.train.runs import base_folder, configuration

LORA = Arm("lora", {"name": "lora", "r": 2}, (1e-3, 1e-2, 3e-2))
HEADLINE = "cannot compare:\n  - "


def tree(folder: Path) -> dict[str, Any]:
    """A configuration as it is in a file; the base and the rows are written into the folder."""
    found = configuration(base_folder(folder / "base"), folder / "rows.jsonl")
    found["data"]["validation_split"] = 0.5
    general = [{"text": f"the answer is {i} hello world"} for i in range(6)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    return found


def quick(folder: Path, **changes: Any) -> Settings:
    """Settings of a small comparison with the general text of `tree`."""
    return Settings(**({"general": (str(folder / "general.jsonl"),), "seeds": 1, "outward": 0} | changes))


def compared(config: Config | dict[str, Any], folder: Path, *arms: Arm, **changes: Any) -> Comparison:
    """The comparison in `folder`/comparison."""
    config = config if isinstance(config, Config) else from_dict(config)
    settings = changes.pop("settings", None) or quick(folder)
    return compare(config, arms or (LORA,), settings, folder / "comparison", **changes)


def timeless(comparison: Comparison) -> Comparison:
    """The comparison without its seconds."""
    settings = {k: v for k, v in comparison.settings.items() if k not in ("seconds", "timings", "planned_seconds")}
    costs = {
        name: dataclasses.replace(cost, step_seconds=(), forward=(), merged_forward=())
        for name, cost in comparison.costs.items()
    }
    return dataclasses.replace(comparison, settings=settings, costs=costs)
