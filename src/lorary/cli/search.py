"""lorary search: the best structure of each layer of a GLoRA supernet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def search(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of glora with supernet: true.")],
    ceiling: Annotated[
        int | None, typer.Option("--ceiling", min=1, help="Most numbers that the adapter may hold; empty: any.")
    ] = None,
    generations: Annotated[int, typer.Option("--generations", min=1, max=100_000, help="How many.")] = 20,
    population: Annotated[
        int, typer.Option("--population", min=2, max=100_000, help="Candidates in each; half mutate, half cross over.")
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was found before.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Search a trained supernet for the terms that each layer is worth.

    Candidates are judged by the loss on the run's validation rows; nothing is trained. The best one becomes an adapter
    of its own, RUN/searched, which merges, loads and generates like any other.
    """
    from lorary.analysis.supernet_search import EvolutionConfig
    from lorary.train.runner.supernet_search import search_run

    half = population // 2
    evolution = EvolutionConfig(
        population, min(10, population), half, half, generations=generations, ceiling=ceiling, seed=seed
    )
    with _bar(quiet) as progress:
        folder, found = search_run(run, evolution, overwrite=overwrite, progress=progress)
    print(
        f"{found.judged:,} candidates: held-out loss {-found.fitness:.4f} with {found.size:,} numbers", file=sys.stderr
    )
    print(folder)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as shown:
        task = shown.add_task("", total=None)

        def progress(judged: int, most: int, best: float) -> None:
            shown.update(task, completed=judged, total=most, description=f"best loss {-best:.4f}")

        yield progress
