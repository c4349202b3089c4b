"""Advice beside a grid: the advised configuration's held-out loss and the best of 24 others.

    python benchmarks/advice.py               # fifteen minutes of a core; goes on where it was
    python benchmarks/advice.py --small       # two steps of everything, to see that it runs

Three tasks train the built-in base on a small part of a built-in set, by `lorary train`'s own trainer. The rules were
made with the first two in view, and the third is for a test of them. The grid varies what is advised with most effect,
4 learning rates x 3 ranks x 2 targets; everything else is as advised, and all runs keep their best evaluation. The
advised run and the best of the grid are repeated with another seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import tempfile
import time
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers.trainer_utils import SaveStrategy

from cases import machine
from lorary.analysis.svg import INK, line, style, to_svg
from lorary.cli._inspect.runs import train
from lorary.model.loading.from_pretrained import skeleton
from lorary.model.text_table import aligned
from lorary.train.advice.advise import advise
from lorary.train.advice.draft import changed
from lorary.train.config.load import from_dict
from lorary.train.runner.build import build_model, build_trainer
from lorary.train.runner.prepare import RunPlan, prepare

TASKS: dict[str, dict[str, Any]] = {
    "docstrings": {
        "train": [{"path": "builtin:docstrings", "limit": 100}],
        "validation": [{"path": "builtin:docstrings", "limit": 48}],
    },
    "topics": {
        "train": [{"path": "builtin:topics", "limit": 3}],
        "validation": [{"path": "builtin:topics", "limit": 2}],
        "max_length": 64,
    },
    "c-headers": {  # that the rules were not fitted with
        "train": [{"path": "builtin:c-headers", "limit": 3}],
        "validation": [{"path": "builtin:c-headers", "limit": 1}],
        "max_length": 64,
    },
}
RATES, RANKS, TARGETS = (3e-4, 1e-3, 3e-3, 1e-2), (4, 16, 64), ("attention", "all-linear")
SEEDS = (42, 1)  # the first is the default of a configuration, and the grid's
Record = dict[str, Any]
KEY = ("task", "lr", "r", "targets", "seed")


@cache
def prepared(task: str, steps: int | None) -> tuple[RunPlan, Any]:
    """The advised run of a task, and the base on the meta device."""
    tree: Record = {"model": "builtin:base", "data": TASKS[task]}
    if steps is not None:
        tree["training"] = {"max_steps": steps}
    found = prepare(advise(from_dict(tree)).config)
    return found, skeleton(found.config.model, found.base)


def advised(task: str, steps: int | None) -> Record:
    """The cell of the advised configuration."""
    config = prepared(task, steps)[0].config
    return cell(task, config.training.lr or 0.0, config.method.r or 0, *(config.method.targets or ()))


def cell(task: str, lr: float, r: int, targets: str, seed: int = SEEDS[0]) -> Record:
    """What a run is known by."""
    return dict(zip(KEY, (task, lr, r, targets, seed), strict=True))


def run(wanted: Record, steps: int | None) -> Record:
    """Train one cell; its loss on the held-out rows in the best evaluation, and in the last."""
    start = time.process_time()
    base, empty = prepared(wanted["task"], steps)
    values = {"method.r": wanted["r"], "method.targets": (wanted["targets"],)}
    values |= {"training.lr": wanted["lr"], "training.seed": wanted["seed"]}
    config = changed(base.config, values)
    plan = config.plan(empty)
    model = build_model(dataclasses.replace(base, config=config, plan=plan))
    with tempfile.TemporaryDirectory() as scratch:
        found = dataclasses.replace(base, config=config, plan=plan)
        trainer = build_trainer(found, model, Path(scratch) / "checkpoints", resumed=True, callbacks=[])
        # the losses are all we want, not the adapter
        trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
        train(trainer)  # after an interrupt it exits, and records no half run
        trainer.evaluate()
        trainer.head.remove()
    losses = [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one]
    figures = {"loss": round(min(losses), 5), "last": round(losses[-1], 5)}
    figures |= {"numbers": plan.trainable, "steps": trainer.state.global_step}
    return wanted | figures | {"cpu_seconds": round(time.process_time() - start, 1)}


class Ledger:
    """The runs of one file, written after each of them."""

    def __init__(self, path: Path, head: Record, steps: int | None) -> None:
        self.path, self.head, self.steps = path, head, steps
        found = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
        self.runs: dict[tuple[Any, ...], Record] = {tuple(one[key] for key in KEY): one for one in found}

    def get(self, wanted: Record) -> Record:
        """A run, from the file or made now."""
        key = tuple(wanted.values())
        if key not in self.runs:
            self.runs[key] = found = run(wanted, self.steps)
            print(*key, f"loss {found['loss']:.4f}, {found['cpu_seconds']} s", flush=True)
            self.write()
        return self.runs[key]

    def write(self, **more: Any) -> None:
        """Rewrite the file atomically."""
        rows = ",\n  ".join(json.dumps(one) for one in self.runs.values())
        text = json.dumps(self.head | more)[:-1] + f', "runs": [\n  {rows}\n]}}\n'
        beside = self.path.with_suffix(".part")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)


def against_grid(ledger: Ledger, task: str) -> Record:
    """The advised run beside the grid's best, over all seeds."""
    grid = [ledger.get(cell(task, *values)) for values in itertools.product(RATES, RANKS, TARGETS)]
    best = min(grid, key=lambda one: float(one["loss"]))
    mine = advised(task, ledger.steps)
    losses = {
        name: [ledger.get(one | {"seed": seed})["loss"] for seed in SEEDS]
        for name, one in (("advised", mine), ("best", {key: best[key] for key in KEY}))
    }
    return {
        "task": task,
        "advised": mine,
        "best": best,
        "losses": losses,
        "best_after_the_last_step": min(one["last"] for one in grid),
        "off": losses["advised"][0] / best["loss"] - 1,
        "off_mean": fmean(losses["advised"]) / fmean(losses["best"]) - 1,
    }


def picture(ledger: Ledger, summaries: list[Record]) -> str:
    """Loss against the learning rate for every rank and target, and the advised run, one panel for each task."""
    title = "The advised run beside a grid of 24"
    with style():
        figure = Figure(figsize=(4.2 * len(summaries), 3.8))
        for at, one in enumerate(summaries):
            axes = figure.add_subplot(1, len(summaries), at + 1)
            for i, (targets, r) in enumerate(itertools.product(TARGETS, RANKS)):
                losses = [ledger.get(cell(one["task"], lr, r, targets))["loss"] for lr in RATES]
                axes.plot(RATES, losses, label=f"{targets}, r = {r}", **line(i))
            axes.plot(
                one["advised"]["lr"],
                one["losses"]["advised"][0],
                "*",
                color=INK,
                markersize=13,
                label="advised",
                zorder=5,
            )
            axes.set(title=f"builtin:{one['task']}", xscale="log", xlabel="learning rate", ylabel="held-out loss, nats")
            axes.set_ylim(one["best"]["loss"] * 0.99, one["best"]["loss"] * 1.14)
        axes.legend(fontsize=7)
        words = "; ".join(f"{one['task']}: {one['off']:+.1%} of the best" for one in summaries)
        return to_svg(figure, title, words)


def show(summaries: list[Record]) -> None:
    """Print the advised run and the best of the grid."""
    rows = [("task", "run", "rate", "r", "targets", "loss", "of 2 seeds")]
    for one in summaries:
        for name in ("advised", "best"):
            run_, losses = one[name], one["losses"][name]
            figures = f"{run_['lr']:g}", str(run_["r"]), run_["targets"], f"{losses[0]:.4f}", f"{fmean(losses):.4f}"
            rows.append((one["task"], name, *figures))
    print(*aligned(rows), sep="\n")
    for one in summaries:
        print(
            f"{one['task']}: the advised loss is {one['off']:+.2%} of the best ({one['off_mean']:+.2%} over all seeds)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(TASKS), help="one task")
    parser.add_argument("--small", action="store_true", help="two steps: to see that it runs")
    parser.add_argument("--out", type=Path, help="default: results/advice.json; a passing file with --small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lorary").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp()) if options.small else Path(__file__).parent / "results"
    out = options.out or folder / "advice.json"
    ledger = Ledger(out, {"machine": machine(options)}, 2 if options.small else None)
    tasks = [options.only] if options.only else list(TASKS)
    summaries = [against_grid(ledger, task) for task in tasks]
    ledger.write(summaries=summaries)
    out.with_suffix(".svg").write_text(picture(ledger, summaries), encoding="utf-8")
    show(summaries)


if __name__ == "__main__":
    main()
