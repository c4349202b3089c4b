"""The memory of a run, as `lorary plan` shows it: plain text in a pipe, tables in a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorary.train.config.config import Config
    from lorary.train.runner.memory_forecast import Forecast

Rows = list[tuple[str, ...]]


def show(config: Config, found: Forecast, size: float | None) -> None:
    """Items, the GPUs that have room for them, and what to change where the wanted one has not.

    Args:
        config: of the run.
        found: what it will need.
        size: of the GPU that there is, in GB; None: the largest that there is.
    """
    from lorary.analysis.memory.gpu_fit import SIZES

    items: Rows = [*found.memory.rows(), *(("note", note) for note in found.memory.notes)]
    _print("in training, at the fullest moment", items)
    if found.memory.activations is None:
        return
    _print(_need(found), _room(found, size))
    wanted = size or SIZES[-1]
    if found.need.room(wanted) < 0:
        _print(f"to fit into {wanted:g} GB", _advice(config, found, wanted))


def _need(found: Forecast) -> str:
    from lorary.analysis.memory.gpu_fit import gigabytes

    total, overhead = gigabytes(found.need.total), gigabytes(found.need.overhead)
    return f"on a GPU {total} as nvidia-smi counts: {overhead} of it CUDA and fragmentation"


def _room(found: Forecast, size: float | None) -> Rows:
    from lorary.analysis.memory.gpu_fit import SIZES, gigabytes

    rows: Rows = []
    for of in sorted({*SIZES, *([size] if size else [])}):
        room = found.need.room(of)
        answer = f"fits, {gigabytes(room)} free" if room >= 0 else f"{gigabytes(-room)} too much"
        rows.append((f"{of:>5g} GB", answer))
    return rows


def _advice(config: Config, found: Forecast, size: float) -> Rows:
    from lorary.analysis.memory.gpu_fit import gigabytes
    from lorary.train.runner.memory_advice import proposals

    rows: Rows = []
    for proposal in proposals(config, found, size):
        fits = "fits" if proposal.need.room(size) >= 0 else "not enough"
        rows.append((f"{gigabytes(proposal.need.total):>8}", fits, proposal.what, proposal.how))
    return rows or [("nothing", "that lorary knows saves a hundredth of it")]


def _print(title: str, rows: Rows) -> None:
    print()
    if sys.stdout.isatty():
        _table(title, rows)
        return
    print(title)
    for row in rows:
        print(_line(row))


def _line(row: tuple[str, ...]) -> str:
    if len(row) == 2:
        return f"{row[0]:<12}{row[1]}"
    need, fits, what, how = row
    return f"{need}  {fits:<10}  {what}\n{'':22}{how}"


def _table(title: str, rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table

    table: Any = Table(title=title, title_justify="left", show_header=False)
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
