"""lorary init: a commented configuration to start from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[Path, typer.Argument(help="Output file; - is stdout.")] = Path("train.yaml"),
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema instead, for editors.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented training configuration.

    It runs unchanged, offline, on the built-in base and data: lorary train train.yaml
    """
    from lorary.errors import Diagnostic, FileError
    from lorary.files.atomic import atomic_file
    from lorary.train.config.template import json_schema, template

    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif str(file) == "-":
        print(template(), end="")
    elif file.exists() and not force:
        problem = Diagnostic(str(file), "exists already, and was not changed", "use --force, or another name")
        raise FileError("nothing was written:", [problem])
    else:
        text = template().encode()
        with atomic_file(file) as writer:
            writer.write(text)
        print(f"wrote {file}; try it with: lorary train {file} --dry-run", file=sys.stderr)
