"""lorary train: a run from a configuration."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.train.config.config import Config
    from lorary.train.runner.prepare import RunPlan


def train(
    config: Annotated[Path, typer.Argument(help="Configuration (YAML); `lorary init` writes one to start from.")],
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value over the file; may be repeated.")] = None,
    after: Annotated[
        list[str] | None,
        typer.Option("--after", help="Adapter folders of the tasks before this one (o-lora), with commas."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the run in the output folder first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would happen; write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")] = False,
) -> None:
    """Train an adapter.

    lorary train my.yaml --set training.lr=1e-4. SIGINT or SIGTERM finish the step and save a checkpoint.
    """
    from lorary.train.config.load import load

    past = [json.dumps([path for text in after for path in text.split(",")])] if after else []
    described = load(config, [*(sets or []), *(f"method.after={paths}" for paths in past)])
    with _speaking(quiet):
        if dry_run:
            _dry_run(described)
            return
        from lorary.train.runner.run import run

        done = run(described, resume=resume, overwrite=overwrite, quiet=quiet)
    if done.interrupted:
        raise typer.Exit(128 + done.interrupted)
    if os.environ.get("RANK", "0") == "0":  # one line, however many processes
        print(done.adapter)


@contextmanager
def _speaking(quiet: bool) -> Iterator[None]:
    """lorary's own messages go to stderr, without the time."""
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING if quiet else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lorary")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _dry_run(config: Config) -> None:
    from lorary.train.runner.prepare import prepare

    prepared = prepare(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
    _show(prepared)


def _show(prepared: RunPlan) -> None:
    from rich.console import Console

    from lorary.train.data.lint import rich_text, text

    print(prepared.config.to_yaml())
    print(prepared.plan)
    print()
    print(prepared.memory)
    print(f"\nsteps     {prepared.steps:,}")
    said = {*prepared.lint.notes, *prepared.plan.notes}  # these stand beside the lint and the plan
    for note in prepared.notes:
        if note not in said:
            print(f"note      {note}")
    if sys.stdout.isatty():
        Console(highlight=False, soft_wrap=True).print(rich_text(prepared.lint))
    else:
        print(text(prepared.lint))
