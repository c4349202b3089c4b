"""run.json: the mark of a run folder, with the end of the run and the files that it wrote.

Only a folder with this mark is ever resumed or cleared, so that a README or plots of a user's own are safe. It is the
first file of a run, and the last one to be written: that the run is finished. Folders of lorary 0.6 and before, which
lack it, are known by their resolved configuration beside its other files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lorary
from lorary.files import strict_json
from lorary.train.config.load import MARK, RESOLVED

_LIMIT = 2**20  # bytes
_OLD = (RESOLVED, ("checkpoints", "env.json", "metrics.jsonl"))  # this file and one of those


@dataclass(frozen=True)
class RunRecord:
    """The contents of a mark.

    Args:
        lorary: the version that wrote it.
        steps: the optimizer steps of a finished run; None until then.
        end: why the run has ended.
        files: paths in the folder, of files with names that others than lorary choose (a tokenizer's).
    """

    lorary: str = lorary.__version__
    steps: int | None = None
    end: str = ""
    files: tuple[str, ...] = ()

    @staticmethod
    def read(folder: Path) -> RunRecord | None:
        """The mark of a folder; None if it has none, so that it is not a run."""
        try:
            with open(folder / MARK, "rb") as file:
                found = strict_json.parse(file.read(_LIMIT + 1), _LIMIT)
        except FileNotFoundError:
            return _older_record(folder)
        except (OSError, ValueError):
            return None
        return RunRecord(**{**found, "files": tuple(found["files"])}) if _is_record(found) else None

    def text(self) -> str:
        """The mark as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def with_files(self, names: Iterable[str]) -> RunRecord:
        """With further files."""
        return replace(self, files=tuple(sorted({*self.files, *names})))


def _is_record(found: Any) -> bool:
    if not isinstance(found, dict) or set(found) != {"lorary", "steps", "end", "files"}:
        return False
    texts = isinstance(found["lorary"], str) and isinstance(found["end"], str)
    steps = found["steps"] is None or type(found["steps"]) is int
    return texts and steps and isinstance(found["files"], list) and all(map(_is_inside, found["files"]))


def _is_inside(name: Any) -> bool:
    """Whether a recorded name is that of a file in a folder of the run: not of the run's folder itself, or outside."""
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute():
        return False
    return len(Path(name).parts) > 1 and ".." not in Path(name).parts


def _older_record(folder: Path) -> RunRecord | None:
    """The record of a run of lorary 0.6 or before, whose last file was the adapter's card."""
    first, others = _OLD
    if not (folder / first).is_file() or not any((folder / name).exists() for name in others):
        return None
    if not (folder / "adapter" / "README.md").is_file():
        return RunRecord("")
    return RunRecord("", steps=_last_step(folder), end="its adapter is written")


def _last_step(folder: Path) -> int:
    """The last step in the log."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return max((int(json.loads(line)["step"]) for line in lines), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0
