"""lorary demo: fine-tuning from end to end on the built-in model, offline, in under two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorary.cli._demo.folder import REPORT, clear_folder


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the run, the models and the report.")] = Path("demo"),
    steps: Annotated[int, typer.Option("--steps", min=2, max=10_000, help="Optimizer steps.")] = 120,
) -> None:
    """Fine-tune the built-in language model, and show every step.

    Plans, trains LoRA on a kind of text that the model has never seen, compares perplexity and samples before and
    after, saves, reloads, merges, verifies, and writes one HTML report. Needs no network and no GPU.
    """
    clear_folder(out)
    from lorary.cli._demo import report, run

    result = run.run_demo(out, steps)
    report.write_report(result, out / REPORT)
    report.print_report(result, out / REPORT)
