"""The run folder: the complete record of a run, written by one process at a time.

run.json               the mark of a run folder, and whether the run is finished
config.resolved.yaml   the configuration with every default filled in
env.json               versions and machine
sample.txt             the first row as the model sees it, the labelled tokens marked
metrics.jsonl          one line for each logged step and evaluation
events.log             lorary's messages, with the time
plots/loss.svg         the loss over the steps
report.html            the run on one page
tensorboard/           TensorBoard's event files; only with report_to: tensorboard
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

import lorary
from lorary.adapters.save_load import ADAPTER_FILES
from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.files.atomic import atomic_file, make_folder, remove, remove_stale, write_error
from lorary.files.home import expanded
from lorary.files.strict_json import finite
from lorary.train.config.config import Config
from lorary.train.config.load import MARK, RESOLVED
from lorary.train.runner.run_record import RunRecord
from lorary.train.trainer.checkpoint import list_checkpoints

CONFIG, ENVIRONMENT, SAMPLE = RESOLVED, "env.json", "sample.txt"
METRICS, EVENTS, PLOTS = "metrics.jsonl", "events.log", "plots"
ADAPTER, CHECKPOINTS, CARD, LOCK = "adapter", "checkpoints", "README.md", ".lock"
HELD = ".lock.held"
SEARCHED, IMPORTANCE, REPORT = "searched", "importance.json", "report.html"
TRACKERS = ("tensorboard", "runs", "wandb", "trackio")  # folders that loggers may create
LOCKS = (LOCK, HELD)
RUN_FILES = (ENVIRONMENT, SAMPLE, METRICS, EVENTS, IMPORTANCE, CARD, REPORT)
WRITTEN = {  # folder -> files that a run writes there, beside those that its record names
    PLOTS: ("loss.svg", "ranks.svg", "importance.svg"),
    ADAPTER: (*ADAPTER_FILES, CARD),
    SEARCHED: ADAPTER_FILES,
}

# Options that a resumed run may change: they do not influence the result.
_MAY_DIFFER = {"output", "training.save_total_limit", "training.report_to", "training.eval_batch_size"}
# Options that an extended run may change.
_LENGTH = frozenset({"training.epochs", "training.max_steps"})
# Options whose files may be in another folder now: what they hold is checked, by digests and the base's fingerprint.
_MAY_MOVE = {
    *("model.id", "model.adapter", "method.after", "training.reward"),
    *("data.train", "data.validation", "data.chat_template"),
}


class RunFolder:
    """The folder of one run.

    Args:
        path: of the folder, which need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = expanded(path)

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
        options = {"resume": resume, "overwrite": overwrite, "extend": extend}
        self.check(config, **options)
        make_folder(self.path)
        with self.locked():
            self.check(config, **options)  # another run may have ended in the meantime
            if overwrite:
                self._clear()
            for folder in (self.path, self / CHECKPOINTS, *(self / name for name in WRITTEN)):
                if folder.is_dir():
                    remove_stale(folder)
            yield

    def mark(self) -> None:
        """Mark the folder as a run that is not finished."""
        self.write(MARK, replace(self.record() or RunRecord(), lorary=lorary.__version__, steps=None, end="").text())

    def record(self) -> RunRecord | None:
        """The run in the folder; None if it holds none."""
        return RunRecord.read(self.path)

    def finished(self) -> RunRecord | None:
        """The finished run in the folder, with its adapter; else None."""
        record = self.record()
        complete = record is not None and record.steps is not None and (self / ADAPTER / ADAPTER_FILES[0]).is_file()
        return record if complete else None

    def note_written(self, name: str, **facts: Any) -> None:
        """Record all files below a folder of the run as written by it.

        Args:
            name: of the folder.
            facts: other fields of the record to set.
        """
        names = [str(p.relative_to(self.path)) for p in (self / name).rglob("*") if p.is_file()]
        self.write(MARK, replace((self.record() or RunRecord()).with_files(names), **facts).text())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A context in which no other process writes to the folder; the system unlocks it when the process ends.

        The holder is named in a file of its own: the locks of one machine need not be visible on another, and on some
        systems a locked file cannot be read.

        Raises:
            StateError: another process holds the lock, or one on another machine took it.
            FileError: nothing can be written there.
        """
        lock, path = FileLock(self / HELD, timeout=0), self / LOCK
        try:
            lock.acquire()
        except Timeout:
            raise _in_use(path, _object(path), "wait for it, or name another folder") from None
        except OSError as error:  # a folder of someone else, or a full disk
            raise write_error(path, error) from error
        try:
            holder = _object(path)
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

    def check(self, config: Config, *, resume: bool, overwrite: bool, extend: bool = False) -> None:
        """Refuse a folder that this run may not write to.

        Raises:
            ConfigError: every reason.
        """
        headline = f"cannot train into {str(self.path)!r}:"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(headline, [Diagnostic("output", "is a file", "name a folder")])
        names = sorted({p.name for p in self.path.iterdir()} - {*LOCKS}) if self.path.is_dir() else []
        names = [name for name in names if not name.startswith(".lorary-")]
        if names and not resume and not overwrite:
            fix = "pass --resume to continue it, --overwrite to remove it, or name another folder"
            raise ConfigError(headline, [Diagnostic("output", f"is not empty: it holds {', '.join(names[:5])}", fix)])
        if resume and CONFIG in names:
            changed = _differences(self._saved_config(headline), config, _LENGTH if extend else frozenset())
            if changed:
                raise ConfigError("the folder belongs to another run:", changed)
        if names and self.record() is None:
            what = f"holds files that lorary did not write: {', '.join(names[:5])}"
            raise ConfigError(
                headline, [Diagnostic("output", what, f"it has no {MARK} of lorary's; name another folder")]
            )

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
        """Remove the run and nothing else. Killed half-way, it leaves a run without checkpoints to clear again."""
        record = self.record() or RunRecord()
        trackers = TRACKERS if self._used_trackers() else ()
        self.mark()
        for path in [*list_checkpoints(self / CHECKPOINTS), *(self / CHECKPOINTS / name for name in trackers)]:
            remove(path)
        inside = [f"{folder}/{name}" for folder, names in WRITTEN.items() for name in names]
        for name in (*inside, *record.files, *RUN_FILES, *trackers, CONFIG):
            if name in trackers or not (self / name).is_dir():  # a folder of a file's name is a user's
                remove(self / name)
        for name in (CHECKPOINTS, *WRITTEN):
            with suppress(OSError):  # it holds files of a user
                (self / name).rmdir()
        self.write(MARK, RunRecord().text())

    def _used_trackers(self) -> bool:
        try:
            saved = yaml.safe_load((self / CONFIG).read_text(encoding="utf-8"))
            return set(saved["training"]["report_to"]) != {"none"}
        except (OSError, yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError):
            return False

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the run; empty if the file is missing or damaged."""
        return _object(self / name)

    def history(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, up to the first damaged line (which a killed process may leave)."""
        try:
            lines = (self / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
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
    old, new = flatten(saved), flatten(config.record())
    return [
        Diagnostic(key, f"{old.get(key)!r} in the run, {new.get(key)!r} here", _remedy(key, old.get(key), new.get(key)))
        for key in sorted((old.keys() | new.keys()) - _MAY_DIFFER - allowed)
        if old.get(key) != new.get(key) and not (key in _MAY_MOVE and _moved(old.get(key), new.get(key)))
    ]


def _remedy(key: str, old: Any, new: Any) -> str:
    shorter = isinstance(old, int | float) and isinstance(new, int | float) and new < old
    if key in _LENGTH and not shorter:
        return "pass --extend to make the run longer"
    extended = "; after --extend that is its config.resolved.yaml" if key in _LENGTH else ""
    return f"resume with the run's own configuration{extended}"


def _moved(old: Any, new: Any) -> bool:
    """Whether two sources are files or folders of the same name, the new one on this machine."""
    if isinstance(old, dict) and isinstance(new, dict):
        rest = [{**source, "path": ""} for source in (old, new)]
        return rest[0] == rest[1] and _moved(old.get("path"), new.get("path"))
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_moved, old, new))
    texts = isinstance(old, str) and isinstance(new, str)
    return old == new or (texts and Path(new).is_absolute() and Path(old).name == Path(new).name)


def flatten(tree: Any, place: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys."""
    if not isinstance(tree, dict) or not tree:
        return {place: tree}
    return {k: v for key, value in tree.items() for k, v in flatten(value, f"{place}.{key}".lstrip(".")).items()}


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(path: Path, holder: dict[str, Any], fix: str) -> StateError:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this machine')}"
    return StateError("the run folder is in use:", [Diagnostic(str(path.parent), f"{who} trains here", fix)])
