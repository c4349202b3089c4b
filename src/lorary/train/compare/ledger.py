"""The record of a comparison on the disk: `comparison.json` in its folder, written after every run that ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Comparison
from lorary.errors import ConfigError, Diagnostic
from lorary.files.atomic import make_folder, remove, remove_stale
from lorary.model.fingerprint import Fingerprint
from lorary.train.compare.request import LEFT_OUT, Request
from lorary.train.runner.folder import LOCKS, RunFolder, flatten

FILE, RUNS = "comparison.json", "runs"


class Ledger:
    """The comparison in a folder, and its file.

    Args:
        request: the comparison.
        comparison: what has been measured so far.
    """

    def __init__(self, request: Request, comparison: Comparison) -> None:
        self.request, self.comparison = request, comparison

    @staticmethod
    @contextmanager
    def opened(request: Request, asked: Request, facts: dict[str, Any], overwrite: bool) -> Iterator[Ledger]:
        """A context in which only this process writes to the folder: a new comparison, or the one that is there.

        Args:
            request: the comparison.
            asked: as it was asked for, to be recognised.
            facts: for the settings of the record.
            overwrite: first remove the comparison in the folder.

        Raises:
            ConfigError: the folder holds another comparison, or other files.
            StateError: another process uses it.
        """
        path = request.folder
        check_folder(asked, overwrite)
        with _new_only_if_it_fits(path), RunFolder(path).locked():
            check_folder(asked, overwrite)
            remove_stale(path)
            if overwrite:  # a kill in between leaves a record that names none of the runs
                task: Any = request.config.task
                store.write(Comparison({"request": identity(asked)}, task, request.arms), path / FILE)
                remove(path / RUNS, ignore_errors=True)
                (path / FILE).unlink(missing_ok=True)
            found = store.read(path / FILE) if (path / FILE).exists() else None
            facts = _plain(facts)
            _check_same_base_and_rows(found, facts)
            settings = {**(found.settings if found else {}), **facts, "request": identity(asked)}
            if found is None:
                task = request.config.task
                found = Comparison(settings, task, request.arms)
            ledger = Ledger(request, dataclasses.replace(found, settings=settings))
            ledger.note()
            yield ledger

    def note(self, **changes: Any) -> None:
        """Write the record with changed fields, its runs in the order of the request."""
        names = {arm.name: i for i, arm in enumerate(self.request.arms)}
        changed = dataclasses.replace(self.comparison, **changes)
        trials = sorted(changed.trials, key=lambda t: (names.get(t.arm, -1), t.seed, t.lr))
        self.comparison = dataclasses.replace(changed, trials=tuple(trials))
        store.write(self.comparison, self.request.folder / FILE)

    def note_settings(self, **settings: Any) -> None:
        """Write the record with further settings."""
        self.note(settings={**self.comparison.settings, **settings})


@contextmanager
def _new_only_if_it_fits(path: Path) -> Iterator[None]:
    """A context in which a folder exists; a new one is removed if the request turns out to be refused."""
    is_new = not path.exists()
    make_folder(path)
    try:
        yield
    except ConfigError:
        if is_new and not (path / RUNS).exists():  # refused before its first run
            shutil.rmtree(path, ignore_errors=True)
        raise


def identity(asked: Request) -> dict[str, Any]:
    """What makes two requests the same comparison, as plain data."""
    ignored: Any = {"output": True, "compare": True, "training": {*LEFT_OUT}}
    config = asked.config.model_dump(mode="json", exclude=ignored)
    settings = dataclasses.asdict(asked.settings)
    settings = {key: value for key, value in settings.items() if key not in ("workers", "budget")}
    arms = {arm.name: {"method": arm.method, "rates": arm.rates} for arm in asked.arms}
    order = ",".join(arm.name for arm in asked.arms)  # the first one may be the reference of ranks
    return _plain({"config": config, "settings": settings, "arms": arms, "order": order, "starts": "of each arm"})


def _check_same_base_and_rows(found: Comparison | None, facts: Mapping[str, Any]) -> None:
    """Refuse to go on with another base, or with other rows, than those of the runs in the folder.

    Raises:
        ConfigError: how the base differs, and every part of the data that has changed.
    """
    if found is None or not (found.trials or found.base_test):
        return
    before, now = (Fingerprint.from_record(settings.get("base")) for settings in (found.settings, facts))
    problems = [*before.disagreements(now)] if before and now else []
    rows, fix = facts.get("digests", {}), "restore the {}, pass overwrite, or name another folder"
    problems = [dataclasses.replace(problem, fix=fix.format("base")) for problem in problems]
    for part, digest in found.settings.get("digests", {}).items():
        if (own := rows.get(part)) != digest:
            what = f"are not those of the runs in the folder: digest {str(digest)[:12]} there, {str(own)[:12]} here"
            problems.append(Diagnostic(f"{part} rows", what, fix.format("data")))
    if problems:
        raise ConfigError("the folder holds another comparison:", problems)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as a JSON file gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def check_folder(asked: Request, overwrite: bool) -> None:
    """Refuse a folder that this comparison may not write to.

    Raises:
        ConfigError: every reason.
    """
    path, headline = asked.folder, f"cannot compare in {str(asked.folder)!r}:"
    if path.exists() and not path.is_dir():
        raise ConfigError(headline, [Diagnostic("folder", "is a file", "name a folder")])
    names = sorted({entry.name for entry in path.iterdir()} - {*LOCKS}) if path.is_dir() else []
    names = [name for name in names if not name.startswith(".lorary-")]
    if names and FILE not in names:
        what = f"holds files of something else: {', '.join(names[:5])}"
        raise ConfigError(headline, [Diagnostic("folder", what, f"it has no {FILE}; name another folder")])
    if names and not overwrite:
        there, here = flatten(store.read(path / FILE).settings.get("request", {})), flatten(identity(asked))
        fix = "repeat the request that it was begun with, pass overwrite, or name another folder"
        fixes = {"starts": "an earlier version began it: pass overwrite, or name another folder"}
        changed = [
            Diagnostic(key, f"{there.get(key)!r} in the folder, {here.get(key)!r} here", fixes.get(key, fix))
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ]
        if changed:
            raise ConfigError("the folder holds another comparison:", changed)
