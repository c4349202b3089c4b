"""lorary diff: two adapters compared, site by site."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Adapter folder, run folder that holds one, or Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    sites: Annotated[int, typer.Option("--sites", min=1, max=100_000, help="How many sites to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every site, instead of a table.")] = False,
) -> None:
    """Compare two adapters of any methods: where, how far and in which directions their updates differ.

    Norms, cosines and the angles between the spaces that they write to (outputs) and read from (inputs) come from the
    factors alone, without the base. The sites that differ most come first.
    """
    import lorary
    from lorary.adapters import load_adapter
    from lorary.adapters.compose.diff import HEAD
    from lorary.adapters.resolve import find_adapter
    from lorary.cli._table import print_table

    first, second = (load_adapter(find_adapter(name, "compare")) for name in (a, b))
    found = lorary.diff(first, second)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(f"A: {a}", f"B: {b}", *found.lines(), sep="\n")
    if not found.identical and found.have_updates:
        print_table("the sites that differ most", HEAD, found.rows(sites))
