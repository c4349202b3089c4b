"""lorary train: a run from a configuration."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.train.config.config import Config


def train(
    config: Annotated[Path, typer.Argument(help="Configuration (YAML); `lorary init` writes one to start from.")],
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value over the file; may be repeated.")] = None,
    after: Annotated[
        list[str] | None,
        typer.Option("--after", help="Adapter folders of earlier tasks (o-lora), comma-separated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output folder.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Resume it with a larger training.epochs or training.max_steps.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run in the output folder first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan of the run; write nothing.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="With --dry-run: all keys, also those at their defaults.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")] = False,
) -> None:
    """Train an adapter.

    lorary train my.yaml --set training.lr=1e-4. On SIGINT or SIGTERM it finishes the step and saves a checkpoint.
    Two more epochs of a finished run: lorary train my.yaml --extend --set training.epochs=5.
    """
    from lorary.cli._logging import logging_to_stderr
    from lorary.train.config.load import load

    flags = {}
    if after:
        flags["--after"] = ("method.after", json.dumps([path for text in after for path in text.split(",")]))
    run_config = load(config, sets or [], flags)
    with logging_to_stderr(quiet):
        if dry_run:
            _dry_run(run_config, everything)
            return
        from lorary.train.runner.run import run

        done = run(run_config, resume=resume, extend=extend, overwrite=overwrite, quiet=quiet)
    if done.interrupted:
        raise typer.Exit(128 + done.interrupted)
    if os.environ.get("RANK", "0") == "0":  # one line, whatever the number of processes
        print(done.adapter)


def _dry_run(config: Config, everything: bool) -> None:
    from rich.console import Console

    from lorary.train.config.summary import summary
    from lorary.train.data.lint import rich_text, text
    from lorary.train.runner.prepare import prepare

    prepared = prepare(config, processes=int(os.environ.get("WORLD_SIZE", "1")))

    print(prepared.config.to_yaml() if everything else summary(config, prepared.config))
    print()
    print(prepared.plan)
    print()
    print(prepared.memory)
    print(f"\nsteps     {prepared.steps:,}")
    shown = {*prepared.lint.notes, *prepared.plan.notes}  # printed with the lint and the plan
    for note in prepared.notes:
        if note not in shown:
            print(f"note      {note}")
    if sys.stdout.isatty():
        Console(highlight=False, soft_wrap=True).print(rich_text(prepared.lint))
    else:
        print(text(prepared.lint))
