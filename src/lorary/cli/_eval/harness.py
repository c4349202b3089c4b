"""Benchmarks of lm-evaluation-harness on several models, and their table."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorary.analysis.harness import evaluate_tasks, harness_model, task_manager
from lorary.cli import printable
from lorary.cli._eval.models import EvalModel
from lorary.cli._model import ready_model
from lorary.cli._table import rich_table

Results = dict[str, dict[str, Any]]  # model -> task -> metric -> value


def run_harness(
    models: Sequence[EvalModel], tasks: Sequence[str], folder: Path | None, limit: int | None, batch_size: int
) -> Results:
    """The harness's results by model."""
    manager = task_manager(tasks, folder)
    found: Results = {}
    for model in models:
        language_model = harness_model(ready_model(model.section, model.folder), model.tokenizer, batch_size)
        found[model.name] = evaluate_tasks(language_model, tasks, manager, limit)
        del language_model
        gc.collect()  # models contain reference cycles, and the next one needs the memory
    return found


def print_harness(results: Results, as_json: bool) -> None:
    """One row for each task and metric, one column for each model; or JSON."""
    if as_json:
        print(json.dumps(results, indent=2, default=str))
        return
    keys = list(dict.fromkeys((task, m) for tasks in results.values() for task, found in tasks.items() for m in found))
    rows = [
        (task, metric.removesuffix(",none"), *(_cell(tasks.get(task, {}), metric) for tasks in results.values()))
        for task, metric in keys
        if any(isinstance(tasks.get(task, {}).get(metric), float) for tasks in results.values())
        and "stderr" not in metric
    ]
    head = ("task", "metric", *map(printable, results))
    Console(highlight=False).print(rich_table("lm-evaluation-harness, with standard errors", rows, head))


def _cell(found: dict[str, Any], metric: str) -> str:
    value, name = found.get(metric), metric.partition(",")
    error = found.get(f"{name[0]}_stderr,{name[2]}")
    if not isinstance(value, float):
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
