"""The result of a demo, on the terminal and as one HTML page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as Columns

from lorary.analysis.html_report import Code, KeyFigure, Paragraph, Section, Table, html_report, versions_section
from lorary.analysis.run_sections import loss_section, plan_section, samples_section
from lorary.cli._demo.folder import MERGED, RUN
from lorary.cli._demo.run import DESCRIPTIONS, DemoResult
from lorary.files.atomic import atomic_file


def print_report(result: DemoResult, report: Path) -> None:
    """Print the results on the terminal."""
    console = Console(highlight=False)
    text = DESCRIPTIONS[result.data]
    console.print(f"perplexity on held-out {text}: {result.before:.1f} → [bold]{result.after:.1f}[/bold]\n")
    columns = Columns(*(Column(name, overflow="fold", ratio=1) for name in ("base", "adapted")), expand=True)
    for sample in result.samples:
        columns.add_row(*(_shown(sample.prompt + text) for text in (sample.base, sample.adapted)), end_section=True)
    console.print(columns, markup=False)
    console.print("\n[bold]Saved, loaded, merged[/bold]")
    for step, what in _checks(result):
        console.print(f"{step:<26}{what}", soft_wrap=True, markup=False)
    console.print(f"\n[bold]{result.seconds:.0f} s[/bold] in all, {result.training:.0f} s of them training")
    console.print(f"report: {report.absolute().as_uri()}\n", soft_wrap=True)
    console.print("[bold]What to type next[/bold]")
    console.print(_next(result), soft_wrap=True, markup=False)


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page atomically."""
    with atomic_file(path) as file:
        file.write(html(result).encode())


def html(result: DemoResult) -> str:
    """The results as one HTML page."""
    lead = (
        f"A language model that has only read Python learns {DESCRIPTIONS[result.data]}: its weights stay frozen, and "
        f"two thin matrices are trained beside {len(result.plan.sites)} of its layers."
    )
    sections = [
        loss_section(result.history, _caption(result)),
        samples_section(result.samples, "The same prompts, continued by both models with the same random numbers."),
        plan_section(result.plan),
        Section("Saved, loaded, merged", [Table(("step", "result"), _checks(result))]),
        Section("What to type next", [Paragraph("The same for a model and data of your own:"), Code(_next(result))]),
        versions_section(),
    ]
    return html_report("lorary demo", lead, _figures(result), sections)


def _figures(result: DemoResult) -> list[KeyFigure]:
    plan, about = result.plan, DESCRIPTIONS[result.data]
    return [
        KeyFigure("Perplexity", f"{result.before:.1f} → {result.after:.1f}", f"on held-out {about}; lower is better"),
        KeyFigure("Trained", f"{plan.trainable:,}", f"{plan.share:.1%} of {plan.total:,} parameters"),
        KeyFigure(
            "Merged − adapted", f"{result.merged:.1e}", f"largest difference of logits up to {result.largest:.0f}"
        ),
        KeyFigure("Time", f"{result.seconds:.0f} s", f"{result.training:.0f} s of it training"),
    ]


def _caption(result: DemoResult) -> str:
    steps = max(int(record["step"]) for record in result.history)
    return f"Cross entropy in nats over {steps} optimizer steps: of the training batches, and of held-out files."


def _checks(result: DemoResult) -> list[tuple[str, str]]:
    adapter, merged = result.folder / RUN / "adapter", result.folder / MERGED
    return [
        ("saved", f"{adapter}: {result.adapter_bytes:,} bytes of tensors, in files that PEFT reads too"),
        ("loaded into a fresh base", f"logits differ from the trained model's by {result.reloaded:.1e} at most"),
        ("merged into plain layers", f"logits differ from the adapted model's by {result.merged:.1e} at most"),
        ("the merged model", f"{merged}: an ordinary Transformers model"),
    ]


def _next(result: DemoResult) -> str:
    run = result.folder / RUN
    prompt = result.samples[0].prompt
    return "\n".join(
        [
            f'lorary generate {run} "{prompt}"      # the model that was just trained',
            "lorary init my.yaml                    # a commented configuration: name your model and data in it",
            "lorary train my.yaml --dry-run         # what would happen, and one sample with its loss mask",
            "lorary train my.yaml",
            "lorary methods                         # other methods, and how they combine",
        ]
    )


def _shown(text: str) -> str:
    """The first lines of a sample, without control characters."""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in text.expandtabs(4).splitlines()]
    return "\n".join(lines[:8])
