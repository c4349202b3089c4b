"""The measurements of `lorary eval`, one model after another, and their table."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence

from rich.console import Console

from lorary.analysis.evaluation import Evaluation, evaluate
from lorary.cli import printable
from lorary.cli._eval.data import EvalData
from lorary.cli._eval.models import EvalModel
from lorary.cli._model import ready_model
from lorary.cli._notes import print_notes
from lorary.cli._progress import progress_bar
from lorary.cli._table import rich_table
from lorary.model.loading.quiet import quiet_progress_bars

HEAD = ("model", "loss", "perplexity", "accuracy", "tokens", "rows")


def run_eval(models: Sequence[EvalModel], data: EvalData, batch_size: int, quiet: bool) -> list[Evaluation]:
    """The results of language models on the data, in order."""
    tokenized = [data.rows(model.tokenizer) for model in models]
    if any(rows != tokenized[0] for rows in tokenized[1:]):
        note = "these models tokenize differently: their losses and perplexities per token cannot be compared"
        print_notes([note])
    results = []
    with quiet_progress_bars(), progress_bar(sum(map(len, tokenized)), quiet=quiet) as update:
        for model, rows in zip(models, tokenized, strict=True):
            update(description=model.name)
            loaded = ready_model(model.section, model.folder)
            pad = model.tokenizer.pad_token_id or 0
            results.append(evaluate(loaded, rows, batch_size=batch_size, pad=pad, progress=lambda n: update(advance=n)))
            del loaded
            gc.collect()  # models contain reference cycles, and the next one needs the memory
    return results


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
