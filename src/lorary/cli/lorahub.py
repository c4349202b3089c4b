"""lorary lorahub: a mixture of adapters whose weights fit a few examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.adapters.compose.lorahub import WeightSearch


def lorahub(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders, run folders that hold one, or Hub ids.")
    ],
    examples: Annotated[str, typer.Option("--examples", "-e", help="A few rows, as `data` in a configuration.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the mixture and the report; must be empty.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model; else as the first adapter names it.")] = None,
    form: Annotated[
        str, typer.Option("--form", help="product: the sum of the updates; factor: the paper's, for equal ranks.")
    ] = "product",
    budget: Annotated[int, typer.Option("--budget", min=1, max=1_000_000, help="Candidates at most.")] = 40,
    l1: Annotated[float, typer.Option("--l1", min=0.0, help="Strength of the penalty on the weights.")] = 0.05,
    bound: Annotated[float, typer.Option("--bound", min=0.0, help="Weights are from -BOUND to BOUND.")] = 1.5,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed of the search.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most examples: the first of the file.")] = None,
    row_format: Annotated[str, typer.Option("--format", help="Format of a row; auto: detected.")] = "auto",
    max_length: Annotated[int | None, typer.Option("--max-length", min=8, help="Maximum tokens per row.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find the weights with which adapters fit a few examples of an unseen task, without training (LoRAHub).

    Writes the mixture as an adapter, and lorahub.html with the weights and the search. Needs pip install
    "lorary[lorahub]". `lorary mix` takes weights that you give.
    """
    import lorary
    from lorary.adapters import save_adapter
    from lorary.adapters.card import write_card
    from lorary.adapters.compose.gradient_free import require_cma
    from lorary.cli._lorahub.inputs import read_inputs
    from lorary.cli._lorahub.report import write_report
    from lorary.cli._notes import print_notes
    from lorary.cli._progress import progress_bar
    from lorary.files.atomic import atomic_directory

    require_cma()
    with atomic_directory(out) as written:
        given = read_inputs(adapters, examples, base, row_format, max_length, limit)
        print_notes(given.notes)
        with progress_bar(quiet=quiet) as update:
            found = lorary.lorahub(
                given.model,
                given.adapters,
                given.rows,
                form=form,
                bounds=(-bound, bound),
                l1=l1,
                budget=budget,
                seed=seed,
                progress=lambda n, total, best: update(completed=n, total=total, description=f"objective {best:.4f}"),
            )
        save_adapter(found.adapter, written, model=given.model)
        write_report(found, written)
        write_card(written, found.adapter, name=out.name)
    _print(found, len(given.rows), as_json)
    print(f"{out}", file=sys.stderr if as_json else sys.stdout)


def _print(found: WeightSearch, rows: int, as_json: bool) -> None:
    """The weights and losses: a table on standard error, or JSON on standard output."""
    import json

    from lorary.cli._lorahub.report import record
    from lorary.cli._notes import print_notes
    from lorary.cli._table import print_table

    if as_json:
        print(json.dumps(record(found), indent=2))
        return
    rows_of = zip(found.names, found.weights, found.alone, strict=True)
    table = [(name, f"{w:+.4f}", f"{alone:.4f}") for name, w, alone in rows_of]
    losses = f"loss {found.loss:.4f} on {rows:,} examples, {found.losses[0]:.4f} of the base alone"
    candidates = f"{len(found.losses):,} candidates"
    print_table("weights found", ("adapter", "weight", "loss alone"), table, [f"{losses}; {candidates}"], stderr=True)
    if not any(found.weights):
        print_notes(["no mixture is better than the base alone: all weights are zero"])
    elif min(found.alone) <= found.loss:
        best = found.names[found.alone.index(min(found.alone))]
        print_notes([f"{best} alone fits the examples no worse than the mixture"])
