"""The command line: one file per command, each light until it runs.

Exit codes: 0 success, 1 failure while running, 2 invalid command line, configuration or method, 3 data, 4 files, 130
and 143 interrupted. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from lorary import __version__
from lorary.cli._quiet import quiet_bitsandbytes
from lorary.errors import LoraryError

COMMANDS = (
    *("train", "compare", "plan", "init", "advise", "methods", "search", "merge"),
    *("mix", "lorahub", "diff", "compress", "extract"),
    *("export", "convert", "check", "verify", "push"),
    *("eval", "chat", "generate", "serve", "inspect", "demo", "doctor"),
)


def main() -> None:
    """Run the command line and exit with its code; `--debug` at any position adds the traceback of an error."""
    quiet_bitsandbytes()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app()(args=arguments, prog_name="lorary")
    except LoraryError as error:
        _fail(str(error), error, error.exit_code, debug)
    except OSError as error:
        what = error.strerror or str(error)
        _fail(f"{what}: {error.filename}" if error.filename else what, error, 1, debug)


def _fail(message: str, error: Exception, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def printable(text: str) -> str:
    """`text` with control characters escaped: file contents must not control the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def app() -> typer.Typer:
    """The program with all commands."""
    program = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    program.callback()(_program)
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"lorary.cli.{name}"), name)
        if isinstance(command, typer.Typer):  # a group of commands
            program.add_typer(command, name=name)
        else:
            program.command(name)(command)
    return program


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorary {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; at any position.")] = False,
) -> None:
    """Train, combine, merge and use LoRA adapters of every kind.

    Start with `lorary demo`, or with `lorary init` and `lorary train train.yaml --dry-run`.
    """
