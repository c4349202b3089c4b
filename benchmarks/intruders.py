"""Intruder dimensions of LoRA beside full fine-tuning: the built-in base learns C headers.

    python benchmarks/intruders.py            # a few minutes
    python benchmarks/intruders.py --small    # two steps of everything, to see that it runs

LoRA of rank 1 and 16 and full fine-tuning from the same base, with the same batches and steps (Shuttleworth et al.
2024, arXiv:2410.21228). Of each: the held-out loss of the task, the loss on Python, which the base was trained on, and
the number of singular vectors among the ten largest of each weight that the base does not have, by the threshold.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

import lorary
from cases import machine, new_table
from lorary import builtin
from lorary.analysis.inspection.figures import AdapterInspection
from lorary.analysis.svg import line, style, to_svg
from lorary.builtin import corpora

TASK, BEFORE = "builtin:c-headers", "builtin:python"
LENGTH, BATCH, WARM_UP, CLIP, SEED = 128, 8, 10, 1.0, 0
RATES = {1: 5e-3, 16: 2e-3, None: 3e-4}  # rank -> peak learning rate; None: full fine-tuning
THRESHOLDS = [i / 20 for i in range(2, 20)]


@cache
def tokens(data: str, split: str) -> Tensor:
    """All tokens of one half of a data set."""
    tokenizer = builtin.load_tokenizer()
    texts = (row["text"] for row in corpora.load(data, split, fallback=True))
    return torch.tensor([i for text in texts for i in tokenizer(text + "\n", verbose=False)["input_ids"]])


def batches(steps: int) -> Iterator[Tensor]:
    """Random windows of the task, [BATCH, LENGTH]: the same for every arm."""
    ids, generator = tokens(TASK, "train"), torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([ids[start : start + LENGTH] for start in starts])


@torch.inference_mode()
def loss(model: Any, data: str, rows: int) -> float:
    """Nats per predicted token of evenly spread held-out windows."""
    model.eval()
    ids = tokens(data, "validation")
    starts = torch.linspace(0, len(ids) - LENGTH, rows).long().tolist()
    windows = torch.stack([ids[start : start + LENGTH] for start in starts])
    return fmean(float(model(input_ids=part, labels=part).loss) for part in windows.split(16))


def trained(r: int | None, steps: int) -> Any:
    """The base after its training: by LoRA of rank r, or in full."""
    model: Any = builtin.load_model()
    if r is None:
        groups: Any = [{"params": list(model.parameters())}]
    else:
        method = lorary.method("lora", r=r, alpha=2 * r)
        lorary.attach(model, lorary.plan(model, method), seed=SEED)
        groups = lorary.param_groups(model, lr=RATES[r])
    optimizer = torch.optim.AdamW(groups, lr=RATES[r], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    model.train()
    for ids in track(batches(steps), f"rank {r}" if r else "in full", total=steps):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def by_threshold(found: AdapterInspection, *, tuned: bool) -> list[float]:
    """Intruders per weight for each threshold: left singular vectors."""
    changes = [f.intruders for f in found.changes(tuned=tuned).values() if f.intruders is not None]
    return [fmean(sum(cosine < epsilon for cosine in i.left) for i in changes) for epsilon in THRESHOLDS]


def picture(arms: list[dict[str, Any]]) -> str:
    """Intruders per weight over the threshold, one line for each arm."""
    title = "Intruder dimensions on a new task"
    with style():
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.add_subplot()
        for i, arm in enumerate(arms):
            axes.plot(THRESHOLDS, arm["by_threshold"], label=f"{arm['name']}: loss {arm['task']:.2f}", **line(i))
        axes.axvline(0.5, color="#808080", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="ε, cosine below which a vector intrudes", ylabel="intruders per weight, of 10")
        axes.legend()
        words = ", ".join(f"{arm['name']} {arm['left']} at 0.5" for arm in arms)
        return to_svg(figure, title, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=64, help="held-out windows on which a model is judged")
    parser.add_argument("--small", action="store_true", help="two steps: to see that it runs")
    parser.add_argument("--out", type=Path, help="default: results/intruders.json; a passing file with --small")
    options = parser.parse_args()
    if options.small:
        options.steps, options.rows = 2, 4
    base = builtin.load_model()
    models = {r: trained(r, options.steps) for r in RATES}
    arms = [arm(r, base, models, options.rows) for r in RATES]
    table = new_table(f"{builtin.NAME} on {TASK}, {options.steps} steps", *COLUMNS)
    start = [f"{loss(copy.deepcopy(base), data, options.rows):.3f}" for data in (TASK, BEFORE)]
    table.add_row("base", *start, "", "", "", "")
    for one in arms:
        figures = f"{one['task']:.3f}", f"{one['before']:.3f}", f"{one['effect']:.2%}", f"{one['stable_rank']:.2f}"
        table.add_row(one["name"], *figures, str(one["left"]), str(one["right"]))
    Console(width=140).print(table)
    folder = Path(tempfile.mkdtemp()) if options.small else Path(__file__).parent / "results"
    out = options.out or folder / "intruders.json"
    record = {"machine": machine(options), "base": dict(zip(("task", "before"), map(float, start), strict=True))}
    out.write_text(json.dumps(record | {"thresholds": THRESHOLDS, "arms": arms}, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".svg").write_text(picture(arms), encoding="utf-8")


COLUMNS = ("loss, C headers", "loss, Python", "‖ΔW‖/‖W‖", "stable rank", "left intruders", "right intruders")


def arm(r: int | None, base: Any, models: dict[int | None, Any], rows: int) -> dict[str, Any]:
    """The figures of one arm, over the weights that LoRA adapts."""
    adapter = lorary.Adapter.of(models[1 if r is None else r])
    tuned = r is None
    found = lorary.inspect_adapter(adapter, base, tuned=models[None] if tuned else None)
    left, right = found.intruders(tuned=tuned) or (0, 0)
    return {
        "name": f"LoRA, rank {r}" if r else "full fine-tuning",
        "lr": RATES[r],
        "task": loss(models[r], TASK, rows),
        "before": loss(models[r], BEFORE, rows),
        "effect": found.effect(tuned=tuned),
        "stable_rank": found.stable_rank(tuned=tuned),
        "left": left,
        "right": right,
        "sites": len(found.sites),
        "by_threshold": by_threshold(found, tuned=tuned),
    }


if __name__ == "__main__":
    main()
