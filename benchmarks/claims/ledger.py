"""Every finished run, kept in one JSON file at once, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEY = ("arm", "lr", "seed", "steps")  # what a run is known by


@dataclass(eq=False)
class Ledger:
    """The runs of one file.

    Args:
        path: of the file; it need not exist.

    Attributes:
        runs: what is known of every run, by arm, learning rate, seed and number of steps.
        bytes_kept: what LoRA-FA's row measures: bytes kept for backward, by method.
    """

    path: Path
    runs: dict[tuple[Any, ...], Record] = field(default_factory=dict)
    bytes_kept: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.runs = {tuple(run[name] for name in KEY): run for run in found["runs"]}
            self.bytes_kept = found["bytes_kept"]

    def add(self, record: Record) -> Record:
        """Keep a run, and write the file."""
        self.runs[tuple(record[name] for name in KEY)] = record
        self.write()
        return record

    def write(self) -> None:
        """Rewrite the file atomically: a new one beside it, then one rename."""
        head = {"versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "transformers")}}
        rows = ",\n  ".join(json.dumps(run) for run in self.runs.values())
        text = json.dumps(head | {"bytes_kept": self.bytes_kept})[:-1] + f', "runs": [\n  {rows}\n]}}\n'
        beside = self.path.with_suffix(".part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)
