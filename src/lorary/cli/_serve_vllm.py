"""`lorary serve --engine vllm`: the options of the command line as a vLLM server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from lorary.cli import printable
from lorary.cli._progress import progress_bar
from lorary.cli._serve import Start, base_name, base_of, find_adapters
from lorary.cli._serve import say as print_line
from lorary.errors import ConfigError, Diagnostic

if TYPE_CHECKING:
    from lorary.serve.http.settings import Settings


def run_vllm(start: Start, settings: Settings, host: str, port: int, program: str, options: str, verify: bool) -> None:
    """Serve with vLLM, and exit as it does.

    Args:
        start: what the command line asks for.
        settings: of our own server; its keys are used.
        host, port: where vLLM listens.
        program: the command that runs vLLM.
        options: further options of `vllm serve`.
        verify: whether every adapter is verified.

    Raises:
        LoraryError: an adapter cannot be served, with every reason; or vLLM does not start.
    """
    from lorary.model.loading.source import ModelSection
    from lorary.serve.vllm.plan import VllmSettings
    from lorary.serve.vllm.serve import serve_vllm

    if len(settings.keys) > 1:
        what = f"{len(settings.keys)} keys are given, and vLLM takes one from us"
        raise ConfigError("cannot serve with vLLM:", [Diagnostic("--key", what, "give one")])
    folders = find_adapters(start.adapters)
    base = base_of(folders, start.base)
    section = ModelSection.of(base, dtype=start.dtype)
    chosen = VllmSettings(
        program=program,
        host=host,
        port=port,
        key=next(iter(settings.keys), ""),
        name=base_name(start, base),
        options=options,
    )

    def say(text: str) -> None:
        print_line(printable(text), sys.stderr)

    with progress_bar() as update:
        code = serve_vllm(
            folders, section, chosen, verified=verify, say=say, progress=lambda text: update(description=text)
        )
    raise typer.Exit(code)
