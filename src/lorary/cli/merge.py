"""lorary merge: base and adapter as one plain model folder."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli._options import Base
from lorary.cli._precision import check_precision, merge_precisions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.analysis.merge_error import MergeError
    from lorary.cli._comparison_rows import Rows
    from lorary.model.loading.source import ModelSection

REPORT = "fidelity.json"


def merge(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, run folder that holds one, or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model; must be empty.")],
    base: Base = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (the base's own), float32, bfloat16, float16.")] = "auto",
    onto: Annotated[
        str,
        typer.Option(
            "--onto", help="trained: the weights that it was trained on; original: those before quantisation."
        ),
    ] = "trained",
    rows: Annotated[int, typer.Option("--rows", min=1, max=100_000, help="How many rows to compare on.")] = 8,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; else the held-out rows of the run, or built-in.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Accept another base than in training, if it fits.")] = False,
) -> None:
    """Fold an adapter into its base: a plain Transformers model, for any program that reads one.

    The sum is computed in fp32 and rounded once. The rounding error is measured against the adapted model, shown, and
    saved in fidelity.json. A 4-bit base is written in 16 or 32 bits: quantising again would destroy the update.
    """
    from lorary.adapters.resolve import find_adapter, find_base, read_adapter
    from lorary.cli._comparison_rows import comparison_rows
    from lorary.cli._model import tokenizer_or_none
    from lorary.cli._notes import print_notes
    from lorary.files.atomic import atomic_directory
    from lorary.model.loading.from_pretrained import load_config
    from lorary.model.loading.quiet import quiet_progress_bars
    from lorary.spec.placement import check_mergeable

    check_precision(f"cannot merge {adapter}:", dtype, onto)
    folder = find_adapter(adapter, "merge")
    value = read_adapter(folder, base)
    check_mergeable(value.sites)  # whatever its base is
    own = find_base(folder, base)
    value = read_adapter(folder, own.id) if base is None else value  # which may translate the names of older releases
    section, target = merge_precisions(Path(adapter), value, own, dtype, onto)
    with atomic_directory(output) as written:
        tokenizer = tokenizer_or_none(section, folder)
        compared = comparison_rows(Path(adapter), tokenizer, load_config(section), rows, data)
        model, error = _merged(folder, value, section, target, onto, compared, force)
        with quiet_progress_bars():
            model.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        name = str(target).removeprefix("torch.")
        record = {"dtype": name, "onto": onto, "rows": compared.source} | error.to_dict()
        (written / REPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print_notes(compared.notes)
    print(f"wrote the merged model to {output} ({name})", file=sys.stderr)
    _print_report(error, f"compared on {len(compared.ids):,} {compared.source}")
    print(output)


def _merged(
    folder: Path, adapter: Adapter, section: ModelSection, target: torch.dtype, onto: str, rows: Rows, force: bool
) -> tuple[PreTrainedModel, MergeError]:
    """The merged model and its report. One model at a time is in memory."""
    import lorary
    from lorary.adapters.resolve import load_base
    from lorary.analysis.merge_check import MergeCheck, round_weights
    from lorary.errors import StateError
    from lorary.model.bias_flags import BiasWarning, unserialisable_biases
    from lorary.model.merge import fold

    model = load_base(section, folder, adapter)
    lorary.load(model, folder, force=force)
    check = MergeCheck.of(model, rows.ids)
    if onto == "original" and check.quantized:
        del model
        gc.collect()  # models contain reference cycles
        model = load_base(section, folder, adapter, quantized=False)
        lorary.load(model, folder, force=force, quantize=False)
    sites = check.sites(model, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # refused below, with every name
        fold(model, dtype=target)  # a model that is lost if this fails need not be kept beside the merged one
    if lost := unserialisable_biases(model):
        raise StateError("cannot save the merged model:", lost)
    lorary.dequantize(model, target)
    round_weights(model, target)
    return model, check.against(model, sites)


def _print_report(error: MergeError, rows: str) -> None:
    """The report on standard error: a table on a terminal, plain text elsewhere."""
    from rich.console import Console

    from lorary.analysis.merge_error import HEAD
    from lorary.cli._table import rich_table

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        print(error, rows, sep="\n", file=sys.stderr)
        return
    console.print(rich_table("compared with the adapted model", error.rows(), HEAD), markup=False)
    for line in (error.compared, rows):
        console.print(line, markup=False)
    for text in error.advice:
        console.print(f"advice: {text}", style="yellow", markup=False)
