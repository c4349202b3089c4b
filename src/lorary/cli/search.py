"""lorary search: the best structure of each layer of a GLoRA supernet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def search(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of glora with supernet: true.")],
    ceiling: Annotated[
        int | None,
        typer.Option("--ceiling", min=1, help="Most parameters of the adapter; empty: any."),
    ] = None,
    generations: Annotated[int, typer.Option("--generations", min=1, max=100_000, help="Number of generations.")] = 20,
    population: Annotated[
        int,
        typer.Option("--population", min=2, max=100_000, help="Candidates in each; half mutate, half cross over."),
    ] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Search a trained supernet for the best terms of each layer.

    Candidates are scored by their loss on the run's validation rows; nothing is trained. The best one is saved as an
    ordinary adapter, RUN/searched.
    """
    from lorary.analysis.supernet_search import EvolutionConfig
    from lorary.cli._progress import progress_bar
    from lorary.train.runner.supernet_search import search_run

    half = population // 2
    evolution = EvolutionConfig(
        population, min(10, population), half, half, generations=generations, ceiling=ceiling, seed=seed
    )
    with progress_bar(quiet=quiet) as update:

        def progress(judged: int, total: int, best: float) -> None:
            update(completed=judged, total=total, description=f"best loss {-best:.4f}")

        folder, result = search_run(run, evolution, overwrite=overwrite, progress=progress)
    summary = f"held-out loss {-result.fitness:.4f} with {result.size:,} parameters"
    print(f"{result.judged:,} candidates: {summary}", file=sys.stderr)
    print(folder)
