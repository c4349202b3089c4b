"""The measurements of `lorary eval`, one model after another, and their table."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorary.adapters.resolve import adapter_at, find_model
from lorary.analysis.evaluation import Evaluation, evaluate
from lorary.cli import printable
from lorary.cli._eval.data import DataOptions, EvalData, eval_data, precision_of_first_run
from lorary.cli._model import ready_model
from lorary.cli._progress import progress_bar
from lorary.cli._table import rich_table
from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.layers.rope import max_context
from lorary.model.loading.from_pretrained import load_config, load_tokenizer
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.model.loading.source import ModelSection

HEAD = ("model", "loss", "perplexity", "accuracy", "tokens", "rows")


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate.

    Args:
        name: from the command line.
        folder: of its adapter, if any.
        section: the base.
        tokenizer: of the base.
        context: tokens that it reads; None if unknown.
    """

    name: str
    folder: Path | None
    section: ModelSection
    tokenizer: Any
    context: int | None


def find_models(names: Sequence[str], base: str | None, dtype: str | None) -> list[EvalModel]:
    """The models of the command line.

    Raises:
        FileError: every one that cannot be found.
    """
    found: list[EvalModel] = []
    problems: list[Diagnostic] = []
    precision = precision_of_first_run(names) | ({"dtype": dtype} if dtype is not None else {})
    for name in dict.fromkeys(names):
        try:
            folder, section = find_model(name, base if adapter_at(name) else None)
            section = section.model_copy(update=precision)
            config = load_config(section).get_text_config()
            found.append(EvalModel(name, folder, section, load_tokenizer(section), max_context(config)))
        except LoraryError as error:
            problems += error.problems or [Diagnostic(name, error.headline)]
    if problems:
        raise FileError("cannot evaluate:", problems)
    return found


def run_eval(
    models: Sequence[EvalModel], options: DataOptions, batch_size: int, quiet: bool
) -> tuple[EvalData, list[Evaluation]]:
    """The data and the results of the models on it, in order."""
    data = eval_data(options, [m.name for m in models], min((m.context for m in models if m.context), default=None))
    tokenized = [data.rows(model.tokenizer) for model in models]
    if any(rows != tokenized[0] for rows in tokenized[1:]):
        note = "these models tokenize differently: their losses and perplexities per token cannot be compared"
        print(f"note: {note}", file=sys.stderr)
    results = []
    with quiet_progress_bars(), progress_bar(sum(map(len, tokenized)), quiet=quiet) as update:
        for model, rows in zip(models, tokenized, strict=True):
            update(description=model.name)
            loaded = ready_model(model.section, model.folder)
            pad = model.tokenizer.pad_token_id or 0
            results.append(evaluate(loaded, rows, batch_size=batch_size, pad=pad, progress=lambda n: update(advance=n)))
            del loaded
            gc.collect()  # models contain reference cycles, and the next one needs the memory
    return data, results


def print_results(models: Sequence[EvalModel], data: EvalData, results: Sequence[Evaluation], as_json: bool) -> None:
    """The table, or JSON."""
    pairs = list(zip(models, results, strict=True))
    if as_json:
        found = [{"model": model.name} | result.to_dict() for model, result in pairs]
        print(json.dumps({"data": data.source, "results": found}, indent=2))
        return
    rows = [
        (
            printable(model.name),
            _number(result.loss, 4),
            _number(result.perplexity, 2),
            f"{result.accuracy:.2%}",
            f"{result.tokens:,}",
            f"{result.rows:,}",
        )
        for model, result in pairs
    ]
    console = Console(highlight=False)
    console.print(rich_table(printable(data.source), rows, HEAD))
    console.print("loss in nats per labelled token; accuracy: how often the likeliest token was right", soft_wrap=True)


def _number(value: float, digits: int) -> str:
    if not math.isfinite(value):
        return "infinite" if value == math.inf else "no number"
    return f"{value:,.{digits}f}"
