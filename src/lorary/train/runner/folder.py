"""The run folder: the complete record of a run, written by one process at a time.

config.resolved.yaml   the configuration with every default filled in
env.json               versions and machine
sample.txt             the first row as the model sees it, the labelled tokens marked
metrics.jsonl          one line for each logged step and evaluation
events.log             lorary's messages, with the time
plots/loss.svg         the loss over the steps
importance.json        the layer importance of LoRA-drop's probe, with plots/importance.svg; only with method.drop
checkpoints/           to resume from
adapter/               the trained adapter
searched/              the adapter that `lorary search` found, if this one is a supernet
README.md              its model card
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.files.atomic import atomic_file, remove, remove_stale
from lorary.files.strict_json import finite
from lorary.train.config.config import Config
from lorary.train.runner.extend import CHECKPOINTS as CHECKPOINTS
from lorary.train.runner.extend import LENGTH

CONFIG, ENVIRONMENT, SAMPLE = "config.resolved.yaml", "env.json", "sample.txt"
METRICS, EVENTS, PLOTS = "metrics.jsonl", "events.log", "plots"
ADAPTER, CARD, LOCK = "adapter", "README.md", ".lock"
HELD = ".lock.held"
SEARCHED, IMPORTANCE = "searched", "importance.json"
TRACKERS = ("runs", "wandb", "trackio")  # folders that loggers may create
LOCKS = (LOCK, HELD)
RUN_FILES = (CONFIG, ENVIRONMENT, SAMPLE, METRICS, EVENTS, PLOTS, CHECKPOINTS, ADAPTER, SEARCHED, IMPORTANCE, CARD)

# Options that a resumed run may change: they do not influence the result.
_MAY_DIFFER = {"output", "training.save_total_limit", "training.report_to", "training.eval_batch_size"}


class RunFolder:
    """The folder of one run.

    Args:
        path: of the folder, which need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def opened(self, config: Config, *, resume: bool, overwrite: bool, extend: bool = False) -> Iterator[None]:
        """A context in which only this process writes to the folder: a new one, or that of the resumed run.

        With `extend` the resumed run may have another length.

        Raises:
            ConfigError: the folder is not empty, without `resume` or `overwrite`; or it holds foreign files or another
                run.
            StateError: another process uses it.
        """
        if resume and overwrite:
            kept = "extend" if extend else "resume"
            problem = Diagnostic("", f"`{kept}` keeps the run in the folder, `overwrite` removes it", "choose one")
            raise ConfigError("conflicting options:", [problem])
        self._check(config, resume=resume, overwrite=overwrite, extend=extend)
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self._check(
                config, resume=resume, overwrite=overwrite, extend=extend
            )  # another run may have ended in the meantime
            if overwrite:
                self._clear()
            for folder in (self.path, self / CHECKPOINTS):
                if folder.is_dir():
                    remove_stale(folder)
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process writes to the folder; the system unlocks it when the process ends.

        The holder is named in a file of its own: the locks of one machine need not be visible on another, and on some
        systems a locked file cannot be read.

        Raises:
            StateError: another process holds the lock, or one on another machine took it.
        """
        lock, path = FileLock(self / HELD, timeout=0), self / LOCK
        try:
            lock.acquire()
        except Timeout:
            raise _in_use(path, _holder(path), "wait for it, or name another folder") from None
        try:
            holder = _holder(path)
            if holder.get("host") not in (None, socket.gethostname()):
                raise _in_use(path, holder, f"if that process is gone, remove {path}")
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
        finally:
            with suppress(OSError):  # before the release, so that nobody takes it in between; Windows does it itself
                os.unlink(self / HELD)
            lock.release()

    def _check(self, config: Config, *, resume: bool, overwrite: bool, extend: bool) -> None:
        headline = f"cannot train into {str(self.path)!r}:"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(headline, [Diagnostic("output", "is a file", "name a folder")])
        names = sorted({p.name for p in self.path.iterdir()} - {*LOCKS}) if self.path.is_dir() else []
        foreign = [n for n in names if n not in (*RUN_FILES, *TRACKERS) and not n.startswith(".lorary-")]
        if foreign and (overwrite or resume):
            what = f"holds files that no run of lorary wrote: {', '.join(foreign[:5])}"
            raise ConfigError(headline, [Diagnostic("output", what, "name another folder")])
        if names and not resume and not overwrite:
            fix = "pass --resume to continue it, --overwrite to remove it, or name another folder"
            raise ConfigError(headline, [Diagnostic("output", f"is not empty: it holds {', '.join(names[:5])}", fix)])
        if resume and CONFIG in names:
            changed = _differences(self._saved_config(headline), config, LENGTH if extend else frozenset())
            if changed:
                raise ConfigError("the folder belongs to another run:", changed)

    def _saved_config(self, headline: str) -> dict[str, Any]:
        """The resolved configuration of the run in the folder."""
        try:
            saved = yaml.safe_load((self / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):
            saved = None
        if not isinstance(saved, dict):
            fix = "restore it, or pass --overwrite to start again"
            raise ConfigError(headline, [Diagnostic(CONFIG, "is damaged: it cannot be compared", fix)])
        return saved

    def _clear(self) -> None:
        for name in (*RUN_FILES, *TRACKERS):
            remove(self / name)

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())

    def history(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, up to the first damaged line (which a killed process may leave)."""
        try:
            lines = (self / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
        return records

    def truncate_history(self, step: int) -> None:
        """Remove the records after a step from `metrics.jsonl`: a resumed run logs them again."""
        kept = [record for record in self.history() if record["step"] <= step and "train_loss" not in record]
        self.write(METRICS, "".join(map(json_line, kept)))


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON; non-finite numbers, which JSON lacks, become null."""
    return json.dumps(finite(record)) + "\n"


def _differences(saved: dict[str, Any], config: Config, allowed: Set[str]) -> Sequence[Diagnostic]:
    old, new = _flatten(saved), _flatten(config.record())
    fix, longer = "resume with the run's own configuration", "pass --extend to make the run longer"
    return [
        Diagnostic(key, f"{old.get(key)!r} in the run, {new.get(key)!r} here", longer if key in LENGTH else fix)
        for key in sorted((old.keys() | new.keys()) - _MAY_DIFFER - allowed)
        if old.get(key) != new.get(key)
    ]


def _flatten(tree: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {place: tree}
    return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{place}.{key}".lstrip(".")).items()}


def _holder(path: Path) -> dict[str, Any]:
    """The process named in a lock file; empty if the file is missing or damaged."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(path: Path, holder: dict[str, Any], fix: str) -> StateError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"
    return StateError("the run folder is in use:", [Diagnostic(str(path.parent), f"{who} trains here", fix)])
