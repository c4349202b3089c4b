"""lorary eval: loss, perplexity and accuracy of models on data, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def eval(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Run or adapter folders, Hub ids, model folders, or builtin:base."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Rows, as `data` in a configuration; may be repeated. Else the run's own."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration whose held-out data is used.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as data.loss=all; may be repeated.")
    ] = None,
    row_format: Annotated[str | None, typer.Option("--format", help="Format of a row; else detected.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=8, help="Maximum tokens per row.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Most examples, evenly spread.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, max=100_000, help="Rows at a time.")] = 8,
    base: Annotated[str | None, typer.Option("--base", help="Base model of adapters; else as they name it.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32, bfloat16, float16; else that of the first run.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks of lm-evaluation-harness instead of data, comma-separated."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="Folder with your own tasks for --tasks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure loss, perplexity and token accuracy of a base, an adapter, a run or a merged model.

    lorary eval builtin:base out/ compares a run with its base on the rows that the run held out; --data names others.
    The means are over all labelled tokens, as in training, those of a classifier over rows. --tasks runs benchmarks: pip install "lorary[eval]"
    """
    from lorary.cli._eval.data import DataOptions, eval_data
    from lorary.cli._eval.models import find_models

    options = DataOptions(tuple(data or ()), config, tuple(sets or ()), row_format, max_length, limit)
    _check(options, dtype, tasks, task_folder)
    if tasks is not None:
        from lorary.cli._eval.harness import print_harness, run_harness

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        found = find_models(models, base, dtype)
        print_harness(run_harness(found, names, task_folder, limit, batch_size), as_json)
        return
    from lorary.cli._eval.classify import classifiers, print_classified, run_classifiers
    from lorary.cli._eval.run import print_results, run_eval

    found = find_models(models, base, dtype)
    kinds, context = classifiers(found), min((m.context for m in found if m.context), default=None)
    rows = eval_data(options, [m.name for m in found], context, "classification" if kinds else "sft")
    if kinds:
        print_classified(rows, run_classifiers(found, kinds, rows, batch_size), as_json)
        return
    print_results(found, rows, run_eval(found, rows, batch_size, quiet), as_json)


def _check(options: object, dtype: str | None, tasks: str | None, task_folder: Path | None) -> None:
    """Check the options that depend on each other.

    Raises:
        ConfigError: every invalid option.
    """
    from lorary.cli._eval.data import DataOptions
    from lorary.errors import ConfigError, Diagnostic, did_you_mean

    assert isinstance(options, DataOptions)
    known = ("auto", "float32", "bfloat16", "float16")
    problems = []
    if dtype is not None and dtype not in known:
        problems.append(Diagnostic(f"--dtype {dtype}", "is unknown", did_you_mean(dtype, known)))
    if options.data and options.config is not None:
        problems.append(Diagnostic("--data", "names the rows, and so does --config", "keep one of the two"))
    if tasks is not None and (options.data or options.config is not None):
        problems.append(Diagnostic("--tasks", "bring their own data", "leave out --data and --config"))
    if tasks is not None and not tasks.replace(",", "").strip():
        problems.append(Diagnostic("--tasks", "names no task", "such as --tasks hellaswag,arc_easy"))
    if tasks is None and task_folder is not None:
        problems.append(Diagnostic("--task-folder", "has no effect without --tasks", "remove it"))
    if problems:
        raise ConfigError("cannot evaluate:", problems)
