"""What `lorary inspect context` found, as tables, JSON, a picture and one HTML page."""

from __future__ import annotations

import json
import math
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.analysis.long_context import Context
from lorary.analysis.passkey import DEPTHS, Retrieval
from lorary.cli._context.plan import HTML, JSON, SVG
from lorary.cli._context.run import Found

if TYPE_CHECKING:
    from lorary.analysis.html_report import KeyFigure

Rows = list[tuple[str, ...]]
_BEYOND, _WITHIN = "*", "\N{FIGURE SPACE}"

_HOW = (
    "Perplexity is exp of the mean loss per predicted token. The text is cut into windows of each length: all lengths "
    "see the same text, and a longer window only adds what stands further back."
)
_KEYS = (
    "A random key of five digits is hidden in filler text, at a share of it (the depth), and asked for at the end "
    "(Mohtashami & Jaggi 2023, arXiv:2305.16300). Found: the likeliest continuation is the key. Gain: by how many nats "
    "per token the right key is likelier than after the same text with another key hidden in it; a model that does not "
    "look back so far gains nothing."
)


def tell(found: Found, as_json: bool, out: Path | None) -> None:
    """The result on standard output, as tables or as JSON; notes and where files lie on standard error."""
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(record(found), indent=2))
    else:
        _print(found)
    if out is not None:
        print(f"wrote {out / HTML}, {JSON} and {SVG}", file=sys.stderr)


def record(found: Found) -> dict[str, Any]:
    """Everything in plain values; what is not finite is None."""
    return {
        "data": found.data,
        "tokens": found.tokens,
        "passkeys": found.passkeys,
        "models": [context.to_dict() for context in found.contexts],
        "notes": list(found.notes),
        "versions": dict(_versions()),
    }


def write(found: Found, folder: Path) -> None:
    """Writes context.json, context.svg and context.html into a folder that is there."""
    from lorary.analysis.long_context_plot import context_svg

    texts = {
        JSON: json.dumps(record(found), indent=2) + "\n",
        SVG: context_svg(found.contexts) + "\n",
        HTML: _page(found),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _print(found: Found) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for title, head, rows in _tables(found):
        if not console.is_terminal:
            print(title, *_aligned([head, *rows]), "", sep="\n")
            continue
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 1 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)


def _aligned(rows: Rows) -> list[str]:
    """Plain text: the second column, of names, to the left and all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _tables(found: Found) -> list[tuple[str, tuple[str, ...], Rows]]:
    """(title, head, rows) of each table."""
    longest = found.contexts[0].lengths[-1].tokens
    head, rows = _lengths(found)
    beyond = (
        f" ({_BEYOND} beyond what the model knows)"
        if any(c.known and longest > c.known for c in found.contexts)
        else ""
    )
    tables = [
        (f"perplexity on {found.tokens:,} tokens of {found.data}{beyond}", head, rows),
        (f"nats per token by position, in windows of {longest:,} tokens", *_positions(found)),
    ]
    if any(context.passkeys for context in found.contexts):
        tables.append(("passkeys by depth: found, and gain in nats per token", *_depths(found)))
    return tables


def _lengths(found: Found) -> tuple[tuple[str, ...], Rows]:
    """One row for each length and model: the models below each other, to be compared."""
    head: tuple[str, ...] = ("length", "model", "perplexity", "nats")
    asked = any(context.passkeys for context in found.contexts)
    rows: Rows = []
    for i, length in enumerate(found.contexts[0].lengths):
        for k, context in enumerate(found.contexts):
            of = context.lengths[i]
            mark = _BEYOND if context.known and of.tokens > context.known else _WITHIN
            row = ("" if k else f"{length.tokens:,}", context.model, _shown(of.perplexity) + mark, _nats(of.nats))
            rows.append((*row, *_found(context.hidden(length.tokens))) if asked else row)
    return ((*head, "passkeys found", "gain") if asked else head), rows


def _positions(found: Found) -> tuple[tuple[str, ...], Rows]:
    """One row for each block of positions and model."""
    rows: Rows = [
        ("" if k else f"{block.start:,}-{block.stop - 1:,}", context.model, _nats(context.blocks[i].nats))
        for i, block in enumerate(found.contexts[0].blocks)
        for k, context in enumerate(found.contexts)
    ]
    return ("positions", "model", "nats"), rows


def _depths(found: Found) -> tuple[tuple[str, ...], Rows]:
    """One row for each length and model, one column for each depth."""
    rows: Rows = []
    for length in sorted({cell.length for context in found.contexts for cell in context.passkeys}):
        for k, context in enumerate(found.contexts):
            cells = {cell.depth: cell for cell in context.passkeys if cell.length == length}
            said = ["  ".join(_found(cells.get(depth))) for depth in DEPTHS]
            rows.append(("" if k else f"{length:,}", context.model, *said))
    return ("length", "model", *(f"{depth:.0%}" for depth in DEPTHS)), rows


def _found(cell: Retrieval | None) -> tuple[str, str]:
    return ("", "") if cell is None else (f"{cell.found}/{cell.trials}", f"{cell.gain:+.3f}")


def _page(found: Found) -> str:
    from lorary.analysis.html_report import Block, Paragraph, Picture, Section, Table, html_report
    from lorary.analysis.long_context_plot import context_svg, positions_svg

    lengths, positions, *depths = _tables(found)
    longest = found.contexts[0].lengths[-1].tokens
    asked = bool(depths)
    pictured: list[Block] = [
        Picture(
            context_svg(found.contexts), _HOW + (" The dotted lines mark what a model knows." if _marked(found) else "")
        ),
        Table(*lengths[1:]),
    ]
    by_position: list[Block] = [
        Picture(positions_svg(found.contexts), f"In windows of {longest:,} tokens of the text."),
        Table(*positions[1:]),
    ]
    sections = [Section("Perplexity by length", pictured), Section("Loss by position", by_position)]
    if asked:
        sections.append(Section("Passkeys", [Paragraph(_KEYS), Table(*depths[0][1:])]))
    if found.notes:
        sections.append(Section("Notes", [Paragraph(note) for note in found.notes]))
    sections.append(Section("Versions", [Table(("package", "version"), _versions())]))
    names = ", ".join(context.model for context in found.contexts)
    lead = f"{names}, on {found.tokens:,} tokens of {found.data}."
    return html_report("Use of context", lead, [_figure(context) for context in found.contexts], sections)


def _figure(context: Context) -> KeyFigure:
    """A model's perplexity from the shortest to the longest length."""
    from lorary.analysis.html_report import KeyFigure

    first, last = context.lengths[0], context.lengths[-1]
    value = f"{_shown(first.perplexity)} \N{RIGHTWARDS ARROW} {_shown(last.perplexity)}"
    note = f"perplexity from {first.tokens:,} to {last.tokens:,} tokens"
    return KeyFigure(context.model, value, note + (f"; knows {context.known:,}" if context.known else ""))


def _marked(found: Found) -> bool:
    return any(context.known for context in found.contexts)


def _versions() -> list[tuple[str, str]]:
    names = ("lorary", "torch", "transformers")
    return [("python", platform.python_version()), *((name, metadata.version(name)) for name in names)]


def _shown(perplexity: float) -> str:
    if not math.isfinite(perplexity):
        return "infinite" if perplexity == math.inf else "no number"
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _nats(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no number"
