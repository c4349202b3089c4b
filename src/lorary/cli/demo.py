"""lorary demo: the main job from end to end, on the built-in model, offline, in under two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorary.cli._demo.folder import REPORT, make_room


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the run, the models and the report.")] = Path("demo"),
    steps: Annotated[int, typer.Option("--steps", min=2, max=10_000, help="Optimizer steps.")] = 120,
) -> None:
    """Fine-tune the built-in language model here and now, and show everything that happens.

    Plans, trains LoRA on text of a kind that the model has never seen, compares perplexity and samples before and
    after, saves, reloads, merges, verifies, and writes one HTML report. Needs no network and no GPU.
    """
    make_room(out)
    from lorary.cli._demo import report, run

    found = run.perform(out, steps)
    report.write(found, out / REPORT)
    report.tell(found, out / REPORT)
