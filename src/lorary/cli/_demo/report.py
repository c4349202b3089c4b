"""The result of a demo, on the terminal and as one HTML page."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Column
from rich.table import Table as Columns

from lorary.analysis.html_report import (
    Block,
    Code,
    KeyFigure,
    Paragraph,
    Picture,
    Section,
    SideBySide,
    Table,
    html_report,
)
from lorary.analysis.loss_plot import loss_svg
from lorary.cli._demo.folder import MERGED, RUN
from lorary.cli._demo.run import ABOUT, Demo
from lorary.files.atomic import atomic_file


def tell(found: Demo, report: Path) -> None:
    """The result, on the terminal."""
    console = Console(highlight=False)
    console.print(f"perplexity on held-out {ABOUT[found.data]}: {found.before:.1f} → [bold]{found.after:.1f}[/bold]\n")
    columns = Columns(*(Column(name, overflow="fold", ratio=1) for name in ("base", "adapted")), expand=True)
    for sample in found.samples:
        columns.add_row(*(_shown(sample.prompt + text) for text in (sample.base, sample.adapted)), end_section=True)
    console.print(columns, markup=False)
    console.print("\n[bold]Saved, loaded, merged[/bold]")
    for step, what in _checks(found):
        console.print(f"{step:<26}{what}", soft_wrap=True, markup=False)
    console.print(f"\n[bold]{found.seconds:.0f} s[/bold] in all, {found.training:.0f} s of them training")
    console.print(f"report: {report.absolute().as_uri()}\n", soft_wrap=True)
    console.print("[bold]What to type next[/bold]")
    console.print(_next(found), soft_wrap=True, markup=False)


def write(found: Demo, path: Path) -> None:
    """Writes the page; a killed process leaves the old one or the new one."""
    with atomic_file(path) as file:
        file.write(report(found).encode())


def report(found: Demo) -> str:
    """The page."""
    lead = (
        f"A language model that has only read Python learns {ABOUT[found.data]}: it stays as it is, and beside "
        f"{len(found.plan.sites)} of its layers two thin matrices are trained."
    )
    sections = [
        Section("Loss", [Picture(loss_svg(found.history, "Loss per token"), _caption(found))]),
        Section("Before and after", _samples(found)),
        Section("What was trained", [Code(str(found.plan.method)), _plan(found)]),
        Section("Saved, loaded, merged", [Table(("step", "what was found"), _checks(found))]),
        Section("What to type next", [Paragraph("The same for a model and data of your own:"), Code(_next(found))]),
        Section("Versions", [Table(("package", "version"), _versions())]),
    ]
    return html_report("lorary demo", lead, _figures(found), sections)


def _figures(found: Demo) -> list[KeyFigure]:
    plan, about = found.plan, ABOUT[found.data]
    return [
        KeyFigure("Perplexity", f"{found.before:.1f} → {found.after:.1f}", f"on held-out {about}; lower is better"),
        KeyFigure("Trained", f"{plan.trainable:,}", f"{plan.share:.1%} of {plan.total:,} parameters"),
        KeyFigure("Merged − adapted", f"{found.merged:.1e}", f"in a logit, at most; they go up to {found.largest:.0f}"),
        KeyFigure("Time", f"{found.seconds:.0f} s", f"of which {found.training:.0f} s training"),
    ]


def _caption(found: Demo) -> str:
    steps = max(int(record["step"]) for record in found.history)
    return f"Cross entropy in nats over {steps} optimizer steps: of the training batches, and of held-out files."


def _samples(found: Demo) -> list[Block]:
    words = Paragraph("The same beginnings, continued by both models with the same random numbers.")
    pairs = [SideBySide(s.prompt, [("base", s.base), ("adapted", s.adapted)]) for s in found.samples]
    return [words, *pairs]


def _plan(found: Demo) -> Table:
    """One row for the sites that differ in nothing but the number of their block."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for p in found.plan.sites:
        name = re.sub(r"\d+", "*", p.site.name)
        tensors = ", ".join(f"{role} [{' × '.join(map(str, shape))}]" for role, shape in p.shapes.items())
        rows.setdefault((name, f"{p.site.out_features} × {p.site.in_features}", tensors, f"{p.scale:g}"), []).append(
            p.trainable
        )
    head = ("site", "out × in", "tensors", "s", "sites", "trains")
    return Table(head, [(*key, str(len(sizes)), f"{sum(sizes):,}") for key, sizes in rows.items()])


def _checks(found: Demo) -> list[tuple[str, str]]:
    adapter, merged = found.folder / RUN / "adapter", found.folder / MERGED
    return [
        ("saved", f"{adapter}: {found.adapter_bytes:,} bytes of tensors, in files that PEFT reads too"),
        ("loaded into a fresh base", f"logits differ from the trained model's by {found.reloaded:.1e} at most"),
        ("merged into plain layers", f"logits differ from the adapted model's by {found.merged:.1e} at most"),
        ("the merged model", f"{merged}: an ordinary Transformers model"),
    ]


def _next(found: Demo) -> str:
    run = found.folder / RUN
    prompt = found.samples[0].prompt
    return "\n".join(
        [
            f'lorary generate {run} "{prompt}"      # the model that was just trained',
            "lorary init my.yaml                    # a commented configuration: name your model and data in it",
            "lorary train my.yaml --dry-run         # what would happen, and one sample with its loss mask",
            "lorary train my.yaml",
            "lorary methods                         # other methods, and how they combine",
        ]
    )


def _versions() -> list[tuple[str, str]]:
    names = ("lorary", "torch", "transformers", "trl", "safetensors")
    return [("python", platform.python_version()), *((name, metadata.version(name)) for name in names)]


def _shown(text: str) -> str:
    """The first lines of a sample; control characters in it do nothing to the terminal."""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in text.expandtabs(4).splitlines()]
    return "\n".join(lines[:8])
