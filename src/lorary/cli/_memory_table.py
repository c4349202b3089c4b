"""The memory of a run for `lorary plan`: plain text in a pipe, tables on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lorary.cli._table import rich_table

if TYPE_CHECKING:
    from lorary.train.config.config import Config
    from lorary.train.runner.memory_forecast import Forecast

Rows = list[tuple[str, ...]]


def show(config: Config, found: Forecast, size: float | None) -> None:
    """Print the items, the GPUs that fit, and changes to fit the user's GPU.

    Args:
        config: of the run.
        found: its forecast.
        size: of the user's GPU, in GB; None: the largest one known.
    """
    from lorary.analysis.memory.gpu_fit import SIZES, gigabytes
    from lorary.train.runner.memory_forecast import dtype_notes

    dtypes = dtype_notes(config, "; plan for a GPU with --set model.dtype={}")
    items: Rows = [*found.memory.rows(), *(("note", note) for note in (*found.memory.notes, *dtypes))]
    _print("peak in training", items)
    if found.memory.activations is None:
        return
    total, overhead = gigabytes(found.need.total), gigabytes(found.need.overhead)
    title = f"GPU memory, as nvidia-smi shows it: {total}, of which {overhead} for CUDA and fragmentation"
    _print(title, _free_memory(found, size))
    wanted = size or SIZES[-1]
    if found.need.free_bytes(wanted) < 0:
        _print(f"to fit into {wanted:g} GB", _advice(config, found, wanted))


def _free_memory(found: Forecast, size: float | None) -> Rows:
    from lorary.analysis.memory.gpu_fit import SIZES, gigabytes

    rows: Rows = []
    for gpu in sorted({*SIZES, *([size] if size else [])}):
        free = found.need.free_bytes(gpu)
        answer = f"fits, {gigabytes(free)} free" if free >= 0 else f"{gigabytes(-free)} too much"
        rows.append((f"{gpu:>5g} GB", answer))
    return rows


def _advice(config: Config, found: Forecast, size: float) -> Rows:
    from lorary.analysis.memory.gpu_fit import gigabytes
    from lorary.train.runner.memory_advice import proposals

    rows: Rows = []
    for proposal in proposals(config, found, size):
        fits = "fits" if proposal.need.free_bytes(size) >= 0 else "not enough"
        rows.append((f"{gigabytes(proposal.need.total):>8}", fits, proposal.what, proposal.how))
    return rows or [("nothing", "no known change saves a hundredth of it")]


def _print(title: str, rows: Rows) -> None:
    print()
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False, markup=False).print(rich_table(title, rows))
        return
    print(title)
    for row in rows:
        print(_line(row))


def _line(row: tuple[str, ...]) -> str:
    if len(row) == 2:
        return f"{row[0]:<12}{row[1]}"
    need, fits, what, how = row
    return f"{need}  {fits:<10}  {what}\n{'':22}{how}"
