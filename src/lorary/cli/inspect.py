"""lorary inspect: what a model does, measured and drawn."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

inspect = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure and draw what a model does.")


@inspect.command()
def context(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Adapter or run folders, Hub ids, model folders, or builtin:base."),
    ],
    base: Annotated[str | None, typer.Option("--base", help="Base model of adapters; else the ones they name.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens, with commas; else powers of two up to four times what is known."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Text, as `data` of a configuration; its validation part.")
    ] = "builtin:python",
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, max=1_000_000_000, help="Most tokens of text; all lengths see the same.")
    ] = 32_768,
    passkeys: Annotated[
        int, typer.Option("--passkeys", min=0, max=10_000, help="Keys to hide at each length and depth; 0: none.")
    ] = 4,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for context.json, context.svg and context.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show how well models use long context: perplexity by length, loss by position, and passkeys.

    lorary inspect context builtin:base out/ compares a run with its base; one model is in memory at a time. Lengths
    beyond what a model knows are the point of it, where positions are rotary: a learnt table has no more than it has.
    """
    from lorary.cli._context.plan import Request, checked
    from lorary.cli._context.report import tell, write
    from lorary.cli._context.run import measure
    from lorary.files.atomic import atomic_directory

    asked = checked(Request(tuple(models), base, lengths, data, tokens, passkeys, out))
    # The folder is begun before the work: a place that cannot be written to is no news for its end.
    with nullcontext() if out is None else atomic_directory(out, replace=True) as written:
        found = measure(asked)
        if written is not None:
            write(found, written)
    tell(found, as_json, out)
