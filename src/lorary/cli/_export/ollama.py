"""--to ollama: a Modelfile beside `adapter.gguf`."""

from __future__ import annotations

import shlex

from lorary.cli._export import Export
from lorary.cli._export.base import adapter_and_base, show_command


def write(export: Export) -> None:
    """Write the two files, and print the command that makes a model of them."""
    from lorary.adapters.export.ollama import NAME, export_ollama
    from lorary.cli._generation import tokenizer_of
    from lorary.errors import LoraryError

    adapter, model, section = adapter_and_base(export)
    try:
        tokenizer = tokenizer_of(section, export.adapter)
    except LoraryError:  # a base without one
        tokenizer = None
    export_ollama(adapter, export.output, model=model, tokenizer=tokenizer, **export.options)
    show_command(shlex.join(["ollama", "create", "NAME", "-f", str(export.output / NAME)]))
