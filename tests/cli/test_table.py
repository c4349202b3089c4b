"""Tables on the terminal."""

from __future__ import annotations

import io

from rich.console import Console

from lorary.cli._table import rich_table


def test_brackets_in_names_are_no_markup() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(rich_table("a [/b]", [("[red]x", "[/x]")], ("[/c]", "[d]")))
    for text in ("a [/b]", "[red]x", "[/x]", "[/c]", "[d]"):
        assert text in out.getvalue()
