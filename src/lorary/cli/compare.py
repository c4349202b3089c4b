"""lorary compare: several methods on one base and one task, each with the same search for its learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    source: Annotated[
        Path,
        typer.Argument(metavar="CONFIG|FOLDER", help="Configuration (YAML), or the folder of a comparison to show."),
    ],
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Such as lora,dora+rslora,lora+,wide=lora:r=64; else compare.methods."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option("--rates", help="Learning rates of each: a number such as 3, around its own; or a list."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Runs of each at its best rate, judged on the test rows; else 2.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Optimizer steps of a run; else as in the configuration.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time for all of it, such as 20min; what does not fit is left out.")
    ] = None,
    match: Annotated[
        str | None, typer.Option("--match", help="parameters: ranks that train as many numbers; else rank, as it is.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Method that the others are compared with; else the first.")
    ] = None,
    general: Annotated[
        list[str] | None,
        typer.Option("--general", help="General text on which forgetting is measured; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the comparison; else comparison.")] = None,
    workers: Annotated[
        str | None, typer.Option("--workers", help="Runs at the same time, which share the cores; else 1.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="key=value over the file; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the one in the folder first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; warnings and errors only.")] = False,
) -> None:
    """Compare methods: the same base, data, steps, and search for the learning rate.

    Rates are chosen on validation rows, methods are judged on other rows. The same command goes on where it was
    stopped; lorary compare FOLDER shows the results again. A plus at the end of a name belongs to it: lora++dora is
    lora+ with dora. On SIGINT or SIGTERM it finishes the step and saves a checkpoint.
    """
    from lorary.cli._compare.options import Options, check_folder_options, check_options

    given = {"methods": methods, "rates": rates, "seeds": seeds, "steps": steps, "budget": budget, "match": match}
    given |= {"reference": reference, "workers": workers}
    options = Options(
        {f"--{key}": value for key, value in given.items() if value is not None},
        tuple(general or ()),
        tuple(sets or ()),
        out,
        {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run},
    )
    if source.is_dir():
        check_folder_options(options)
    else:
        check_options(source, options)
    from lorary.cli._compare.run import go_on, show, start

    if not source.is_dir():
        start(source, options, as_json=as_json, quiet=quiet)
    elif resume:
        go_on(source, options, as_json=as_json, quiet=quiet)
    else:
        show(source, reference, as_json=as_json)
