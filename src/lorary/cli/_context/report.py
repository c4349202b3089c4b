"""The measurements of `lorary inspect context` as tables, JSON, a picture and one HTML page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.analysis.long_context import Context
from lorary.analysis.passkey import DEPTHS, Retrieval
from lorary.cli._context.plan import HTML, JSON, SVG
from lorary.cli._context.run import Measurements
from lorary.cli._notes import print_notes
from lorary.cli._table import rich_table
from lorary.model.text_table import aligned

if TYPE_CHECKING:
    from lorary.analysis.html_report import KeyFigure

Rows = list[tuple[str, ...]]
_BEYOND, _WITHIN = "*", "\N{FIGURE SPACE}"

_HOW = (
    "Perplexity is exp of the mean loss per predicted token. The text is cut into windows of each length: all lengths "
    "see the same text, and longer windows only add context."
)
_KEYS = (
    "A random key of five digits is hidden in filler text, at a share of it (the depth), and asked for at the end "
    "(Mohtashami & Jaggi 2023, arXiv:2305.16300). Found: the likeliest continuation is the key. Gain: by how many nats "
    "per token the right key is likelier than after the same text with another key hidden in it; a model that does not "
    "look back that far gains nothing."
)


def print_report(measured: Measurements, as_json: bool, out: Path | None) -> None:
    """Print tables or JSON to standard output, and notes to standard error."""
    print_notes(measured.notes)
    if as_json:
        print(json.dumps(record(measured), indent=2))
    else:
        _print(measured)
    if out is not None:
        print(f"wrote {out / HTML}, {JSON} and {SVG}", file=sys.stderr)


def record(measured: Measurements) -> dict[str, Any]:
    """The measurements in JSON types; None for values that are not finite."""
    from lorary.analysis.html_report import versions

    return {
        "data": measured.data,
        "tokens": measured.tokens,
        "passkeys": measured.passkeys,
        "models": [context.to_dict() for context in measured.contexts],
        "notes": list(measured.notes),
        "versions": versions("lorary", "torch", "transformers"),
    }


def write_report(measured: Measurements, folder: Path) -> None:
    """Write context.json, context.svg and context.html into an existing folder."""
    from lorary.analysis.long_context_plot import context_svg

    texts = {
        JSON: json.dumps(record(measured), indent=2) + "\n",
        SVG: context_svg(measured.contexts) + "\n",
        HTML: _page(measured),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _print(measured: Measurements) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for title, head, rows in _tables(measured):
        if not console.is_terminal:
            print(title, *aligned([head, *rows], names=1), "", sep="\n")
            continue
        console.print(rich_table(title, rows, head, names=1), markup=False)


def _tables(measured: Measurements) -> list[tuple[str, tuple[str, ...], Rows]]:
    """(title, head, rows) of each table."""
    longest = measured.contexts[0].lengths[-1].tokens
    beyond = any(c.max_context and longest > c.max_context for c in measured.contexts)
    legend = f" ({_BEYOND} beyond the model's context)" if beyond else ""
    tables = [
        (f"perplexity on {measured.tokens:,} tokens of {measured.data}{legend}", *_lengths(measured)),
        (f"nats per token by position, in windows of {longest:,} tokens", *_positions(measured)),
    ]
    if any(context.passkeys for context in measured.contexts):
        tables.append(("passkeys by depth: found, and gain in nats per token", *_depths(measured)))
    return tables


def _lengths(measured: Measurements) -> tuple[tuple[str, ...], Rows]:
    """One row per length and model."""
    head: tuple[str, ...] = ("length", "model", "perplexity", "nats")
    passkeys = any(context.passkeys for context in measured.contexts)
    rows: Rows = []
    for i, length in enumerate(measured.contexts[0].lengths):
        for k, context in enumerate(measured.contexts):
            result = context.lengths[i]
            mark = _BEYOND if context.max_context and result.tokens > context.max_context else _WITHIN
            texts = (_perplexity(result.perplexity) + mark, _nats(result.nats))
            row = ("" if k else f"{length.tokens:,}", context.model, *texts)
            rows.append((*row, *_found(context.all_depths(length.tokens))) if passkeys else row)
    return ((*head, "passkeys found", "gain") if passkeys else head), rows


def _positions(measured: Measurements) -> tuple[tuple[str, ...], Rows]:
    """One row per block of positions and model."""
    rows: Rows = [
        ("" if k else f"{block.start:,}-{block.stop - 1:,}", context.model, _nats(context.blocks[i].nats))
        for i, block in enumerate(measured.contexts[0].blocks)
        for k, context in enumerate(measured.contexts)
    ]
    return ("positions", "model", "nats"), rows


def _depths(measured: Measurements) -> tuple[tuple[str, ...], Rows]:
    """One row per length and model, one column per depth."""
    rows: Rows = []
    for length in sorted({cell.length for context in measured.contexts for cell in context.passkeys}):
        for k, context in enumerate(measured.contexts):
            cells = {cell.depth: cell for cell in context.passkeys if cell.length == length}
            texts = ["  ".join(_found(cells.get(depth))) for depth in DEPTHS]
            rows.append(("" if k else f"{length:,}", context.model, *texts))
    return ("length", "model", *(f"{depth:.0%}" for depth in DEPTHS)), rows


def _found(cell: Retrieval | None) -> tuple[str, str]:
    return ("", "") if cell is None else (f"{cell.found}/{cell.trials}", f"{cell.gain:+.3f}")


def _page(measured: Measurements) -> str:
    from lorary.analysis.html_report import Paragraph, Picture, Section, Table, html_report, versions_section
    from lorary.analysis.long_context_plot import context_svg, positions_svg

    lengths, positions, *depths = [Table(head, rows) for _, head, rows in _tables(measured)]
    longest = measured.contexts[0].lengths[-1].tokens
    marked = any(context.max_context for context in measured.contexts)
    about = _HOW + (" Dotted lines mark the context of a model." if marked else "")
    by_position = Picture(positions_svg(measured.contexts), f"In windows of {longest:,} tokens of the text.")
    sections = [
        Section("Perplexity by length", [Picture(context_svg(measured.contexts), about), lengths]),
        Section("Loss by position", [by_position, positions]),
        *(Section("Passkeys", [Paragraph(_KEYS), table]) for table in depths),
    ]
    if measured.notes:
        sections.append(Section("Notes", [Paragraph(note) for note in measured.notes]))
    sections.append(versions_section())
    names = ", ".join(context.model for context in measured.contexts)
    lead = f"{names}, on {measured.tokens:,} tokens of {measured.data}."
    return html_report("Use of context", lead, [_figure(context) for context in measured.contexts], sections)


def _figure(context: Context) -> KeyFigure:
    """A model's perplexity from the shortest to the longest length."""
    from lorary.analysis.html_report import KeyFigure

    first, last = context.lengths[0], context.lengths[-1]
    value = f"{_perplexity(first.perplexity)} \N{RIGHTWARDS ARROW} {_perplexity(last.perplexity)}"
    note = f"perplexity from {first.tokens:,} to {last.tokens:,} tokens"
    return KeyFigure(context.model, value, note + (f"; context {context.max_context:,}" if context.max_context else ""))


def _perplexity(perplexity: float) -> str:
    if not math.isfinite(perplexity):
        return "infinite" if perplexity == math.inf else "no number"
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _nats(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no number"
