"""--to vllm: a plain LoRA in PEFT's files, and the command that serves it."""

from __future__ import annotations

from lorary.cli._export import Export
from lorary.cli._export.base import adapter_and_base, show_command, write_exported_card


def write(export: Export, engine: str = "vllm") -> None:
    """Write PEFT's two files and `serve.sh`, and print the command in it."""
    import shlex

    from lorary.adapters.export.engines import export_for_engine
    from lorary.cli._notes import warnings_as_notes
    from lorary.model.loading.source import location

    adapter, model, section = adapter_and_base(export)
    with warnings_as_notes():
        command = export_for_engine(adapter, export.output, engine, model=model, base=location(section))
    write_exported_card(export.output, adapter)
    show_command(shlex.join(command))
