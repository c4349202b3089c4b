"""lorary init: a commented configuration to start from, with defaults or with advice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorary.cli._options import Decided, GpuMemory


def init(
    file: Annotated[Path, typer.Argument(help="Output file; - is stdout.")] = Path("train.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", help="Advise for this model: Hub id, folder or builtin:base.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="... and these data: file, folder or builtin:NAME.")
    ] = None,
    sets: Decided = None,
    memory: GpuMemory = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead, for editors.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented training configuration.

    It runs unchanged, offline, on the built-in base and data: lorary train train.yaml. With --model and --data it holds
    what `lorary advise` says, with the reasons as comments.
    """
    from lorary.errors import Diagnostic, FileError
    from lorary.files.atomic import atomic_file
    from lorary.train.config.template import json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    if str(file) != "-" and file.exists() and not force:
        problem = Diagnostic(str(file), "exists already, and was not changed", "use --force, or another name")
        raise FileError("nothing was written:", [problem])
    text = _text(model, data, sets or [], memory)
    if str(file) == "-":
        print(text, end="")
        return
    with atomic_file(file) as writer:
        writer.write(text.encode())
    print(f"wrote {file}; try it with: lorary train {file} --dry-run", file=sys.stderr)


def _text(model: str | None, data: str | None, sets: list[str], memory: float | None) -> str:
    """The configuration as it is written, advised on if a model and data are named.

    Raises:
        ConfigError: only one of the two is named, or options are given that only advice uses.
        LoraryError: the model or the data cannot be used.
    """
    from lorary.errors import ConfigError, Diagnostic
    from lorary.train.config.template import template

    if model is None and data is None and not sets and memory is None:
        return template()
    missing = [f"--{name}" for name, value in (("model", model), ("data", data)) if value is None]
    if model is None or data is None:
        problems = [Diagnostic(name, "is not named, and advice needs it") for name in missing]
        raise ConfigError("nothing was written:", problems)
    from lorary.cli import printable
    from lorary.cli._advice import advice_for, configuration
    from lorary.cli._notes import print_notes

    found = advice_for(configuration(model, data, sets), memory)
    print_notes([*found.warnings, *found.notes])
    return printable(template(found.config, found.reasons))
