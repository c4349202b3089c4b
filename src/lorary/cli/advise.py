"""lorary advise: the settings of a run from its model, its data and the machine, each with its reason."""

from __future__ import annotations

from typing import Annotated

import typer

from lorary.cli._options import Decided, GpuMemory

RANKS = "uniform, or gradient: a rank for each layer from one batch's gradients; reads the weights."


def advise(
    model: Annotated[str, typer.Argument(help="Hub id, folder, builtin:base, or a configuration (.yaml).")],
    data: Annotated[
        str | None, typer.Argument(help="File, folder, Hub id or builtin:NAME; a configuration has its own.")
    ] = None,
    sets: Decided = None,
    memory: GpuMemory = None,
    ranks: Annotated[str, typer.Option("--ranks", help=RANKS)] = "uniform",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Advise on targets, rank, alpha, learning rate, batch and epochs, each with its reason and source.

    lorary advise Qwen/Qwen3-8B my.jsonl --memory 24. Nothing is trained or written; `lorary init --model ... --data`
    writes the advised configuration.
    """
    import json

    from lorary.cli import printable
    from lorary.cli._advice import advice_for, configuration
    from lorary.cli._notes import print_notes

    found = advice_for(configuration(model, data, sets or []), memory, ranks)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(printable(str(found)))
    print_notes(found.notes)
