"""--to sglang: a plain LoRA in PEFT's files, and the command that serves it."""

from __future__ import annotations

from lorary.cli._export import Export, vllm


def write(export: Export) -> None:
    """Write PEFT's two files and `serve.sh`, and print the command in it."""
    vllm.write(export, "sglang")
