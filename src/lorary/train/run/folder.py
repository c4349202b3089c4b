"""A run's folder: everything that one needs to know about a run, in one place, written by one process at a time.

config.resolved.yaml   the configuration with every default filled in
env.json               versions and machine
sample.txt             the first row as the model sees it, what is learnt marked
metrics.jsonl          one line for each logged step and evaluation
events.log             what happened, with the time
plots/loss.svg         the loss over the steps
importance.json        what LoRA-drop's probe found, and plots/importance.svg; only with method.drop
checkpoints/           to resume from
adapter/               the result
searched/              what a search made of it, where it is a supernet
README.md              its model card
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.files.atomic import atomic_file, remove_stale
from lorary.train.config.config import Config

CONFIG, ENVIRONMENT, SAMPLE = "config.resolved.yaml", "env.json", "sample.txt"
METRICS, EVENTS, PLOTS = "metrics.jsonl", "events.log", "plots"
CHECKPOINTS, ADAPTER, CARD, LOCK = "checkpoints", "adapter", "README.md", ".lock"
HELD = ".lock.held"
SEARCHED, IMPORTANCE = "searched", "importance.json"
TRACKERS = ("runs", "wandb", "trackio")  # what loggers may leave here
OWN = (
    CONFIG,
    ENVIRONMENT,
    SAMPLE,
    METRICS,
    EVENTS,
    PLOTS,
    CHECKPOINTS,
    ADAPTER,
    SEARCHED,
    IMPORTANCE,
    CARD,
    LOCK,
    HELD,
    *TRACKERS,
)

# What may differ between a run and its resumption without changing a number.
_FREE = {"output", "training.save_total_limit", "training.report_to", "training.eval_batch_size"}


class RunFolder:
    """The folder of one run.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def opened(self, config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Inside, this process alone writes here; the folder is empty, or holds the run that is resumed.

        Raises:
            ConfigError: the folder holds something, and neither resuming nor overwriting was asked for; or what it
                holds is not a run, or another one.
            StateError: another process is at work in it.
        """
        if resume and overwrite:
            problem = Diagnostic("", "`resume` keeps what is there, `overwrite` removes it", "choose one")
            raise ConfigError("conflicting options:", [problem])
        self._check(config, resume=resume, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        with _lock(self.path):
            self._check(config, resume=resume, overwrite=overwrite)  # a run may have ended here just now
            if overwrite:
                self._clear()
            for folder in (self.path, self / CHECKPOINTS):
                if folder.is_dir():
                    remove_stale(folder)
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process of lorary writes here.

        Raises:
            StateError: one does.
        """
        with _lock(self.path):
            yield

    def _check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        name = f"cannot train into {str(self.path)!r}:"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(name, [Diagnostic("output", "is a file", "name a folder")])
        there = sorted(p.name for p in self.path.iterdir() if p.name not in (LOCK, HELD)) if self.path.is_dir() else []
        foreign = [n for n in there if n not in OWN and not n.startswith(".lorary-")]
        if not there:
            return
        if foreign and (overwrite or resume):
            what = f"holds what no run of lorary wrote: {', '.join(foreign[:5])}"
            raise ConfigError(name, [Diagnostic("output", what, "name another folder")])
        if not resume and not overwrite:
            fix = "pass --resume to continue it, --overwrite to remove it, or name another folder"
            raise ConfigError(name, [Diagnostic("output", f"is not empty: it holds {', '.join(there[:5])}", fix)])
        if resume and CONFIG in there:
            changed = _changed(self._resolved(name), config)
            if changed:
                raise ConfigError("the folder belongs to another run:", changed)

    def _resolved(self, name: str) -> dict[str, Any]:
        """The configuration that the run in the folder was started with."""
        try:
            there = yaml.safe_load((self / CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):
            there = None
        if not isinstance(there, dict):
            fix = "restore it, or pass --overwrite to start again"
            raise ConfigError(name, [Diagnostic(CONFIG, "is damaged: what was run here cannot be told", fix)])
        return there

    def _clear(self) -> None:
        for name in OWN:
            path = self / name
            if name in (LOCK, HELD):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())

    def history(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; it ends where a line is damaged, by a killed process or otherwise."""
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

    def go_back_to(self, step: int) -> None:
        """Takes out of `metrics.jsonl` what was logged after a step: it will be logged again."""
        kept = [record for record in self.history() if record["step"] <= step and "train_loss" not in record]
        self.write(METRICS, "".join(line(record) for record in kept))


def line(record: dict[str, Any]) -> str:
    """One record as a line of JSON; a number that is not finite has no place there and becomes null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain) + "\n"


def _changed(there: Any, config: Config) -> Sequence[Diagnostic]:
    old, new = _flat(there), _flat(config.model_dump(mode="json"))
    return [
        Diagnostic(
            key, f"{old.get(key)!r} in the run, {new.get(key)!r} here", "resume with the run's own configuration"
        )
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _FREE
    ]


def _flat(tree: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {place: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{place}.{key}".lstrip(".")).items()}


# --- the lock -------------------------------------------------------------------------------------------------------


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """A lock on a folder, which the system releases when the process ends, however it ends.

    The holder's name lies in a file of its own: locks of one machine need not be seen on another, and on some systems
    a locked file cannot be read.

    Raises:
        StateError: another process holds the lock, or it was taken on another machine.
    """
    lock, path = FileLock(folder / HELD, timeout=0), folder / LOCK
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
        with suppress(OSError):  # while it is held, so that nobody takes it in between; Windows removes it on release
            os.unlink(folder / HELD)
        lock.release()


def _holder(path: Path) -> dict[str, Any]:
    """The process named in a lock file; empty if there is none, or its writer was killed half-way."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(path: Path, holder: dict[str, Any], fix: str) -> StateError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"
    return StateError("the run folder is in use:", [Diagnostic(str(path.parent), f"{who} trains here", fix)])
