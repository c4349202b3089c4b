"""lorary extract: an adapter from two full checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorary.adapters.compose.extraction import Extraction


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the base, or builtin:base.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder or Hub id of the fully tuned model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the adapter; must be empty.")],
    rank: Annotated[int | None, typer.Option("--rank", help="The most directions at a layer.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="The share of the squared norm of each change to keep: 0.99.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--targets", help="Layers to adapt, as in a configuration; repeatable. Else all that differ."),
    ] = None,
    sites: Annotated[int, typer.Option("--sites", min=1, max=100_000, help="How many layers to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every layer, instead of a table.")] = False,
) -> None:
    """Write the adapter that turns a base into a fully tuned model, as nearly as its ranks allow.

    Exactly one of --rank and --energy. Both checkpoints are read one parameter at a time, so that models larger than
    the memory can be compared. Norms, biases and other parameters that differ are kept in full. The error of every
    layer is the least that its rank allows.
    """
    import lorary
    from lorary.adapters import save_adapter
    from lorary.adapters.card import write_card
    from lorary.cli._progress import progress_bar
    from lorary.files.atomic import atomic_directory

    with atomic_directory(out) as written, progress_bar() as update:

        def progress(done: int, total: int, name: str) -> None:
            update(completed=done, total=total, description=name)

        found = lorary.extract(base, tuned, rank=rank, energy=energy, targets=targets or None, progress=progress)
        save_adapter(found.adapter, written)
        write_card(written, found.adapter, name=out.name)
    _print(found, sites, as_json)
    print(out, file=sys.stderr if as_json else sys.stdout)


def _print(found: Extraction, most: int, as_json: bool) -> None:
    """The errors: a table on standard error, or JSON on standard output."""
    from lorary.adapters.compose.extraction import HEAD
    from lorary.cli._table import print_table

    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(*found.lines(), sep="\n", file=sys.stderr)
    if found.sites:
        print_table("the layers with the largest errors", HEAD, found.rows(most), stderr=True)
