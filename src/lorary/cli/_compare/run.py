"""The course of `lorary compare`: what will be run, the runs, the results."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from lorary.analysis.comparison import store
from lorary.cli._compare.announcement import print_announcement
from lorary.cli._compare.options import Options
from lorary.cli._compare.progress import steps_bar
from lorary.cli._compare.results import print_results
from lorary.cli._logging import logging_to_stderr
from lorary.cli._notes import print_notes
from lorary.train.compare.asked import Asked, from_config, from_folder
from lorary.train.compare.compare import prepare_comparison, run_comparison
from lorary.train.compare.ledger import FILE
from lorary.train.compare.request import ignored_keys
from lorary.train.config.load import from_dict, load


def start(source: Path, options: Options, *, as_json: bool, quiet: bool) -> None:
    """Compare what a configuration asks for, or go on with it."""
    config = load(source, options.sets, options.flags)
    print_notes([*config.notes, *ignored_keys(config)])
    _run(from_config(config), options.folder, options.switches, as_json=as_json, quiet=quiet)


def go_on(folder: Path, options: Options, *, as_json: bool, quiet: bool) -> None:
    """Go on with the comparison in a folder, within a new budget if there is one."""
    least = {"model": "builtin:base", "data": "builtin:docstrings"}
    asked = from_dict(least, (), options.flags).compare  # its options are keys of a configuration
    changes = {key: getattr(asked, key) for key in asked.model_fields_set}
    _run(from_folder(folder, **changes), folder, {}, as_json=as_json, quiet=quiet)


def show(folder: Path, reference: str | None, *, as_json: bool) -> None:
    """Print the results of a comparison, as far as it has come."""
    print_results(store.read(folder / FILE), folder, reference, as_json=as_json, again=True)


def _run(asked: Asked, folder: Path, switches: Mapping[str, bool], *, as_json: bool, quiet: bool) -> None:
    dry_run, overwrite = (switches.get(name, False) for name in ("--dry-run", "--overwrite"))
    with logging_to_stderr(quiet=True):
        ready = prepare_comparison(asked.config, asked.arms, asked.settings, folder, overwrite=overwrite)
    if dry_run or not quiet:
        print_announcement(ready, stderr=not dry_run)
    if dry_run:
        return
    try:
        with steps_bar(ready, quiet=quiet) as progress, _logging(quiet):
            done = run_comparison(ready, progress)
    except KeyboardInterrupt:  # before the first run
        _stopped(folder, signal.SIGINT)
    if done.signal:
        _stopped(folder, done.signal)
    print_results(done.comparison, folder, None, as_json=as_json)


@contextmanager
def _logging(quiet: bool) -> Iterator[None]:
    """The messages of the comparison, and only the warnings of its runs."""
    with logging_to_stderr(quiet=True), logging_to_stderr(quiet, "lorary.train.compare"):
        yield


def _stopped(folder: Path, number: int) -> NoReturn:
    """Say that a comparison has been stopped, and how it goes on; end the program."""
    print_notes([f"stopped; the same command goes on, and so does: lorary compare {folder} --resume"])
    raise typer.Exit(128 + number)
