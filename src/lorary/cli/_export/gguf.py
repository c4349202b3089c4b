"""--to gguf: `adapter.gguf`, for llama.cpp's `--lora`."""

from __future__ import annotations

import shlex

from lorary.cli._export import Export
from lorary.cli._export.base import adapter_and_base, show_command


def write(export: Export) -> None:
    """Write the file, and print the command that runs it."""
    from lorary.adapters.export.gguf import NAME, export_gguf, rope_arguments

    adapter, model, _ = adapter_and_base(export)
    export_gguf(adapter, export.output, model=model, **export.options)
    lora = ["--lora", str(export.output / NAME), *rope_arguments(adapter)]
    show_command(shlex.join(["llama-cli", "-m", "BASE.gguf", *lora]))
