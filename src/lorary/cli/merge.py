"""lorary merge: base and adapter as one plain model folder."""

from __future__ import annotations

import gc
import json
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.analysis.merge_error import MergeError
    from lorary.cli._comparison_rows import Rows
    from lorary.model.loading.source import ModelSection

DTYPES, ONTO = ("auto", "float32", "bfloat16", "float16"), ("trained", "original")
REPORT = "fidelity.json"


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run folder that holds one.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model; must not hold anything.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model; else the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (the base's own), float32, bfloat16, float16.")] = "auto",
    onto: Annotated[
        str,
        typer.Option(
            "--onto", help="trained: the weights that it was trained on; original: those before they were quantised."
        ),
    ] = "trained",
    rows: Annotated[int, typer.Option("--rows", min=1, max=100_000, help="How many rows to compare on.")] = 8,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; else those that the run held out, or built-in.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Accept a base it was not trained on, if it fits.")] = False,
) -> None:
    """Fold an adapter into its base: a plain Transformers model, for any program that reads one.

    The sum is taken in fp32 and rounded once. What that costs is measured against the live adapter, shown, and kept
    in fidelity.json. A base in 4 bits is written in 16 or 32: the adapter would not survive being packed again.
    """
    from lorary.adapters import load_adapter
    from lorary.adapters.resolve import adapter_folder, base_of
    from lorary.errors import Diagnostic, FileError
    from lorary.files.atomic import atomic_directory
    from lorary.model.loading.from_pretrained import quiet

    _check(adapter, dtype, onto)
    folder = adapter_folder(adapter)
    if folder is None:
        raise FileError(f"cannot merge {adapter}:", [Diagnostic(str(adapter), "there is no adapter in it")])
    value = load_adapter(folder)
    section, target = _precisions(adapter, value, base_of(folder, base), dtype, onto)
    with atomic_directory(output) as written:
        tokenizer = _tokenizer(section)
        shown = _rows(adapter, tokenizer, section, rows, data)
        model, fidelity = _merged(folder, value, section, target, onto, shown, force)
        with quiet():
            model.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        name = str(target).removeprefix("torch.")
        record = {"dtype": name, "onto": onto, "rows": shown.source} | fidelity.to_dict()
        (written / REPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _tell(fidelity, f"merged into {output}, {name}", shown)
    print(output)


def _check(adapter: Path, dtype: str, onto: str) -> None:
    """Refuse what cannot be merged into; back into a few bits most of all.

    Raises:
        ConfigError: every such option.
    """
    from lorary.errors import ConfigError, Diagnostic, did_you_mean
    from lorary.model.merge import LOSSY

    problems = []
    for option, given, known in (("--dtype", dtype, DTYPES), ("--onto", onto, ONTO)):
        if given in known:
            continue
        if re.search(r"(?<!\d)[48](?!\d)|quant|packed", given.lower()):  # nf4, 4bit, int8, fp8, ...
            fix = "merge into bfloat16 or float32, or keep the 4-bit base and the adapter beside it"
            problems.append(Diagnostic(f"{option} {given}", f"would quantise the merged weights: {LOSSY}", fix))
        else:
            problems.append(Diagnostic(f"{option} {given}", "is unknown", did_you_mean(given, known)))
    if problems:
        raise ConfigError(f"cannot merge {adapter}:", problems)


def _precisions(
    path: Path, adapter: Adapter, section: ModelSection, dtype: str, onto: str
) -> tuple[ModelSection, torch.dtype]:
    """What the base is loaded in and what is written, whatever this machine would compute in.

    The base is never narrower than on disk or than what is written, so that everything is rounded once; but where the
    run had it rounded before it was packed, it is again.

    Raises:
        FileError: the original weights are asked for of a base that is quantised on disk.
    """
    import torch

    from lorary.errors import Diagnostic, FileError
    from lorary.model.loading.from_pretrained import load_config

    config = load_config(section)
    if onto == "original" and getattr(config, "quantization_config", None) is not None:
        fix = "name the model that it was made from with --base, and pass --force"
        what = "is quantised itself, and what its weights were before is not there"
        raise FileError(f"cannot merge {path} onto the original weights:", [Diagnostic(section.id, what, fix)])
    saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    target = saved if dtype == "auto" else getattr(torch, dtype)
    wide = torch.promote_types(saved, target)
    if not adapter.method.storage.writable and onto == "trained":
        trained = getattr(torch, _run_dtype(path), saved)
        wide = wide if torch.promote_types(trained, saved) == trained else trained
    return section.model_copy(update={"dtype": str(wide).removeprefix("torch.")}), target


def _run_dtype(path: Path) -> str:
    """What the base was loaded in by the run that made the adapter; `auto` where that cannot be told."""
    from lorary.cli._comparison_rows import run_config
    from lorary.errors import LoraryError

    try:
        run = run_config(path)
    except (LoraryError, OSError):
        return "auto"
    return "auto" if run is None else run.model.dtype


def _tokenizer(section: ModelSection) -> Any:
    """The base's tokenizer, or None where it has none."""
    from lorary.errors import FileError
    from lorary.model.loading.from_pretrained import load_tokenizer

    try:
        return load_tokenizer(section)
    except FileError as error:
        print(f"note: {error.problems[0] if error.problems else error}", file=sys.stderr)
        return None


def _rows(adapter: Path, tokenizer: Any, section: ModelSection, rows: int, data: str | None) -> Rows:
    from lorary.cli._comparison_rows import comparison_rows
    from lorary.model.loading.from_pretrained import load_config

    return comparison_rows(adapter, tokenizer, load_config(section), rows, data)


def _merged(
    folder: Path, adapter: Adapter, section: ModelSection, target: torch.dtype, onto: str, rows: Rows, force: bool
) -> tuple[PreTrainedModel, MergeError]:
    """The merged model and its report. There is one model at a time."""
    import lorary
    from lorary.analysis.merge_check import MergeCheck, round_weights
    from lorary.errors import StateError
    from lorary.model.bias_flags import BiasWarning, unserialisable_biases
    from lorary.model.loading.from_pretrained import load_model, load_storage

    model = load_model(section, load_storage(adapter.method, adapter.full))
    lorary.load(model, folder, force=force)
    live = MergeCheck.of(model, rows.ids)
    if onto == "original" and live.quantized:
        del model
        gc.collect()  # a model holds itself in circles
        model = load_model(section)
        lorary.load(model, folder, force=force, pack=False)
    sites = live.sites(model, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # refused below, with every name
        lorary.merge(model, dtype=target)
    if lost := unserialisable_biases(model):
        raise StateError("cannot save the merged model:", lost)
    lorary.dequantize(model, target)
    round_weights(model, target)
    return model, live.against(model, sites)


def _tell(fidelity: MergeError, done: str, rows: Rows) -> None:
    """The report, on standard error: a table on a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table

    from lorary.analysis.merge_error import HEAD

    for note in rows.notes:
        print(f"note: {note}", file=sys.stderr)
    print(done, file=sys.stderr)
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        print(fidelity, f"compared on {len(rows.ids):,} {rows.source}", sep="\n", file=sys.stderr)
        return
    table = Table(*HEAD[:1], title="against the live adapter", title_justify="left")
    for name in HEAD[1:]:
        table.add_column(name, justify="right")
    for row in fidelity.rows():
        table.add_row(*row)
    console.print(table, markup=False)
    for line in (fidelity.compared, f"compared on {len(rows.ids):,} {rows.source}"):
        console.print(line, markup=False)
    for text in fidelity.advice:
        console.print(f"advice: {text}", style="yellow", markup=False)
