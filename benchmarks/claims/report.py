"""The figures as a table, and as a picture of the paired differences."""

from __future__ import annotations

import difflib
from pathlib import Path

import continual
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from protocol import Bench, Missing, loss_at
from training import Arm

from claims import Judged, judged
from lorary.analysis.svg import INK, PALETTE, style, to_svg

_LOOKS = {
    "yes": {"color": PALETTE[2], "marker": "o", "label": "the claim holds"},
    "no": {"color": PALETTE[1], "marker": "X", "label": "it does not"},
    "no difference shown": {"color": (INK, 0.7), "marker": "D", "label": "no difference shown"},
}
Found = list[Judged]


def page(bench: Bench) -> str:
    """The rows, the learning rates that were chosen, and what LoRA-FA keeps: three Markdown tables."""
    rows = judged(bench)
    return "\n\n".join([_claims(rows), _rates(bench, rows), _weights(bench), _kept(bench.ledger.bytes_kept)])


def _claims(rows: Found) -> str:
    heads = ("method", "the paper claims", "measured", "against", "difference, 95 % interval", "joint interval")
    lines = ["| " + " | ".join((*heads, "runs", "holds here")) + " |", "|" + "---|" * 8]
    for row, (ours, theirs), d in rows:
        digits = 1 if row.unit == "steps" else 3
        pair, joint = (f"{i.low:+.{digits}f} to {i.high:+.{digits}f}" for i in (d.pair, d.joint))
        figure = f"{d.pair.value:+.{digits}f} ({pair}) {row.unit}"
        runs = f"{len(ours)} pairs" if row.paired else f"{len(ours)}, {len(theirs)}"
        cells = (row.method.name, row.claim, row.what, row.against.name, figure, joint, runs, row.verdict(d))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rates(bench: Bench, rows: Found) -> str:
    lines = [
        "| runs of | numbers trained | learns | steps | learning rate | mean loss: before, in the end |",
        "|---|---|---|---|---|---|",
    ]
    seen: dict[tuple[str, int], Arm] = {}
    for row, _, _ in rows:
        horizon = row.horizon(bench)
        seen |= {(arm.name, horizon): arm for arm in (row.against, row.method)}
    for (name, horizon), arm in seen.items():
        runs = bench.runs(arm, horizon)
        losses = (sum(loss_at(run, arm.task, step) for run in runs) / len(runs) for step in (0, horizon))
        numbers = " to ".join(f"{n:,}" for n in dict.fromkeys((runs[0]["numbers"], runs[0]["numbers_left"])))
        means = ", ".join(f"{loss:.3f}" for loss in losses)
        lines.append("| " + " | ".join((name, numbers, arm.task, str(horizon), f"{runs[0]['lr']:g}", means)) + " |")
    return "\n".join(lines)


def _weights(bench: Bench) -> str:
    lines = ["| O-LoRA's weight | loss of the first task | of the second | overlap of A |", "|---|---|---|---|"]
    try:
        for weight, (first, second, overlap) in continual.weights(bench).items():
            lines.append(f"| {weight:g} | {first:.3f} | {second:.3f} | {overlap:.4f} |")
    except Missing:
        lines.append("| not all measured yet | - | - | - |")
    return "\n".join(lines)


def _kept(sizes: dict[str, int]) -> str:
    lines = ["| method | kept for backward, MiB | LoRA keeps |", "|---|---|---|"]
    for name, size in sizes.items():
        lines.append(f"| {name} | {size / 2**20:.1f} | {sizes['LoRA'] / size:.2f} x |")
    return "\n".join(lines)


def picture(rows: Found) -> str:
    """Mean and joint interval of every row, as SVG: one panel for each unit, left of the line is better."""
    units = sorted({row.unit for row, *_ in rows}, reverse=True)
    sizes = [sum(row.unit == unit for row, *_ in rows) for unit in units]
    with style():
        figure = Figure(figsize=(8, 1.2 + 0.42 * sum(sizes)))
        panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for axes, unit in zip(panels, units, strict=True):
            shown = [(row, d) for row, _, d in rows if row.unit == unit]
            for place, (row, d) in enumerate(shown):
                look = _LOOKS[row.verdict(d)]
                axes.plot(
                    [d.joint.low, d.joint.value, d.joint.high], [place] * 3, markevery=[1], markersize=5.5, **look
                )
            axes.grid(visible=False)
            axes.axvline(0, color=(INK, 0.4), linewidth=0.8)
            names = [f"{r.method.name} vs {r.against.name}:\n{r.what}" for r, _ in shown]
            axes.set_yticks(range(len(shown)), names, size=9)
            axes.set_ylim(len(shown) - 0.5, -0.5)
            axes.set_xlabel(f"difference with its joint 95 % interval, {unit} (less is better)")
        marks = [Line2D([], [], **look) for look in _LOOKS.values()]
        figure.legend(handles=marks, loc="outside upper right", ncols=3)
        verdicts = [row.verdict(d) for row, _, d in rows]
        said = "; ".join(f"{look['label']}: {verdicts.count(verdict)}" for verdict, look in _LOOKS.items())
        return to_svg(figure, "The papers' claims at the size of the built-in base", said)


def into(page: Path, text: str) -> None:
    """Put the text between the marks of a page."""
    before, _, after = _parts(page)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def difference(page: Path, text: str) -> str | None:
    """The lines of the page's tables that are not those of the text; None if all are."""
    there, here = (found.strip().splitlines() for found in (_parts(page)[1], text))
    return "\n".join(difflib.unified_diff(there, here, "the page", "the runs", n=0, lineterm="")) or None


BEGIN, END = "<!-- claims: written by benchmarks/claims -->", "<!-- end of claims -->"


def _parts(page: Path) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    between, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{page} has no place for the table: {BEGIN} ... {END}")
    return before, between, after
