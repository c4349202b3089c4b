"""lorary inspect: measurements and plots of a model, of a trained adapter, and of a run before it begins."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

inspect = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure and plot what a model does, and what an adapter has become.",
)


@inspect.command()
def context(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Adapter or run folders, Hub ids, model folders, or builtin:base."),
    ],
    base: Annotated[str | None, typer.Option("--base", help="Base model of adapters; else as they name it.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens, comma-separated; else powers of two to four times the context."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="Text, as `data` in a configuration; the validation part.")
    ] = "builtin:python",
    tokens: Annotated[
        int,
        typer.Option("--tokens", min=2, max=1_000_000_000, help="Most tokens of text, the same for all lengths."),
    ] = 32_768,
    passkeys: Annotated[
        int, typer.Option("--passkeys", min=0, max=10_000, help="Passkeys at each length and depth; 0: none.")
    ] = 4,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for context.json, context.svg and context.html.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show how well models use long context: perplexity by length, loss by position, and passkeys.

    lorary inspect context builtin:base out/ compares a run with its base; one model is in memory at a time. With rotary
    positions, lengths beyond a model's context are measured too; learned position embeddings end with their table.
    """
    from lorary.cli._context.plan import make_plan
    from lorary.cli._context.report import print_report, write_report
    from lorary.cli._context.run import measure
    from lorary.files.atomic import atomic_directory

    plan = make_plan(models, base, lengths, data, tokens, passkeys, out)
    # opened before the work: fail at once if --out is not writable
    with nullcontext() if out is None else atomic_directory(out, replace=True) as folder:
        measurements = measure(plan)
        if folder is not None:
            write_report(measurements, folder)
    print_report(measurements, as_json, out)


Out = Annotated[Path | None, typer.Option("--out", help="Folder for inspect.html and inspect.json.")]
Data = Annotated[str, typer.Option("--data", help="Data for a model; a configuration names its own.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value over the configuration; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@inspect.command()
def adapter(
    folder: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter folder, run folder that holds one, or Hub id.")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; without it only the spectra are measured.")
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option("--tuned", help="Another model tuned from this base, such as a full fine-tune, to set beside."),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", min=0, max=100_000, help="Singular vectors checked for intruders; 0: none.")
    ] = 10,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Cosine below which a vector is an intruder.")] = 0.5,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show what a trained adapter changes: sizes, spectra, intruder dimensions, magnitude and direction.

    lorary inspect adapter out --base builtin:base --out report. Intruders need the singular vectors of every adapted
    weight of the base, which takes seconds for each on large models: --top 0 spares it.
    """
    from lorary.cli._inspect.adapter import Request, run

    run(Request(folder, base, tuned, top, epsilon), out, as_json=as_json)


@inspect.command()
def intrinsic(
    source: Annotated[
        str, typer.Argument(metavar="[CONFIG]", help="Configuration (.yaml), run folder, or a model.")
    ] = "builtin:base",
    data: Data = "builtin:docstrings",
    sets: Sets = None,
    dims: Annotated[
        str, typer.Option("--dims", help="Dimensions of the subspaces, comma-separated.")
    ] = "16,64,256,1024,4096",
    steps: Annotated[int, typer.Option("--steps", min=1, max=1_000_000, help="Optimizer steps of each training.")] = 40,
    lr: Annotated[
        str, typer.Option("--lr", help="Learning rates in a subspace, comma-separated: the best counts.")
    ] = "1e-3",
    full_lr: Annotated[float, typer.Option("--full-lr", help="Learning rate of full fine-tuning.")] = 3e-4,
    said: Annotated[bool, typer.Option("--said", help="Structure-aware: a trained scale for every layer.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of the projections.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure how few numbers suffice to fine-tune a model on a task: its intrinsic dimension.

    Trains in random subspaces of the parameters, once for each dimension, and in full. Two minutes with the built-in
    model: lorary inspect intrinsic --out report.
    """
    from lorary.cli._inspect.intrinsic import Request, run

    run(Request(source, data, tuple(sets or ()), dims, steps, lr, full_lr, said, seed), out, as_json=as_json)


@inspect.command()
def gradients(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Configuration (.yaml), run folder, or a model for the defaults.")
    ],
    data: Data = "builtin:docstrings",
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show the gradients of a run's first step by role, and what that step changes.

    With LoRA only B moves, because A's gradient is zero as long as B is: lorary inspect gradients builtin:base --set
    method.name=lora. Nothing is saved.
    """
    from lorary.cli._inspect.gradients import run

    run(source, data, tuple(sets or ()), out, as_json=as_json)
