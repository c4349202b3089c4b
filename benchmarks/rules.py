"""What the rules of a method take of a training step: the same step with them and without, in turns, in one process.

    python benchmarks/rules.py                # a Llama of 4 blocks, width 1024, in float32 on the CPU, 512 tokens
    python benchmarks/rules.py --length 64

Each repeat is a step of every variant of a method, in an order that turns; what is reported is the median over the
repeats of the ratio to the first variant within a repeat, with the quartiles of that ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import Tensor

import lorary
from cases import ALL_LINEAR, ALPHA, RANK, llama, machine, new_table, parser, ratio
from lorary.layers.adapted import adapted_layers

STEPS = 1000  # of the run that the rules are told of: all that is measured lies in the middle of it
PAST = 8


class Runner:
    """A model with its optimizer and its rules, and what its steps took."""

    def __init__(self, model: Any, rules: bool, after_step: Callable[[int], None] | None = None) -> None:
        self.model, self.after_step = model.train(), after_step
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        self.rules = lorary.rules(model, STEPS, self.optimizer) if rules else None
        self.wall: list[float] = []
        self.losses: list[float] = []

    def step(self, ids: Tensor) -> None:
        """Forward, backward, optimizer and rules, timed."""
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        if self.rules is not None:
            loss = loss + self.rules.penalty()
        loss.backward()
        if self.rules is not None:
            self.rules.after_backward()
        self.optimizer.step()
        if self.rules is not None:
            self.rules.after_step()
        if self.after_step is not None:
            self.after_step(len(self.losses) + 1)
        self.optimizer.zero_grad()
        self.wall.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def _attached(base: Any, method: lorary.Method, after: Any = ()) -> Any:
    model = copy.deepcopy(base)
    return lorary.attach(model, lorary.plan(model, method, after=after))


def _adalora(base: Any) -> dict[str, Runner]:
    method = lorary.method("adalora", r=12, target=8, alpha=ALPHA, start=0, final=0.1)
    config = AdaLoraConfig(
        init_r=12,
        target_r=8,
        tinit=0,
        tfinal=STEPS // 10,
        total_step=STEPS,
        lora_alpha=ALPHA,
        target_modules=ALL_LINEAR,
    )
    theirs = get_peft_model(copy.deepcopy(base), config)
    return {
        "no rules": Runner(_attached(base, method.replace(rules=())), rules=False),
        "rules": Runner(_attached(base, method), rules=True),
        "PEFT": Runner(theirs, rules=False, after_step=theirs.base_model.update_and_allocate),
    }


def _o_lora(base: Any) -> dict[str, Runner]:
    first = lorary.method("o-lora", r=RANK // 2, alpha=ALPHA / 2)
    past: list[lorary.Adapter] = []
    for task in range(PAST):
        model = _attached(base, first)
        for layer in adapted_layers(model).values():
            torch.manual_seed(task)
            with torch.no_grad():
                layer.params["A"].normal_(std=layer.site.in_features**-0.5)
                layer.params["B"].normal_(std=1e-3)
        past.append(lorary.Adapter.of(model))
    hard = lorary.method("o-lora", r=RANK // 2, alpha=ALPHA / 2, hard=True)
    return {
        "no past": Runner(_attached(base, first), rules=True),
        f"{PAST} past tasks": Runner(_attached(base, first, past), rules=True),
        f"{PAST} past tasks, hard": Runner(_attached(base, hard, past), rules=True),
        f"{PAST} past tasks, no rule": Runner(_attached(base, first.replace(rules=()), past), rules=False),
    }


def _delta_lora(base: Any) -> dict[str, Runner]:
    def closed(start: int) -> Runner:
        return Runner(_attached(base, lorary.method("delta-lora", r=RANK, alpha=ALPHA, start=start)), rules=True)

    paper = lorary.method("delta-lora", r=RANK, alpha=ALPHA, start=-1, mode="paper")
    return {
        "LoRA": Runner(_attached(base, lorary.method("lora", r=RANK, alpha=ALPHA)), rules=False),
        "closed, from step 1": closed(-1),
        "closed, after step 1": closed(0),
        "paper": Runner(_attached(base, paper), rules=True),
    }


CASES: dict[str, Callable[[Any], dict[str, Runner]]] = {
    "AdaLoRA": _adalora,
    "O-LoRA": _o_lora,
    "Delta-LoRA": _delta_lora,
}


def measured(runners: dict[str, Runner], arguments: argparse.Namespace) -> dict[str, Any]:
    """variant -> its time in ms, and the quartiles of its ratio to the first one."""
    ids = torch.randint(2048, (arguments.batch, arguments.length), device=arguments.device)
    order = list(runners.values())
    for turn in range(arguments.repeats + 2):
        first = turn % len(order)
        for runner in order[first:] + order[:first]:
            runner.step(ids)
    assert all(math.isfinite(loss) for runner in order for loss in runner.losses)
    times = {name: runner.wall[2:] for name, runner in runners.items()}
    reference = next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(wall),
            "ratio": ratio(wall, reference),
        }
        for name, wall in times.items()
    }


def main() -> None:
    arguments = parser(__doc__, "methods", "rules-LENGTH.json").parse_args()
    torch.set_num_threads(arguments.threads)
    base = llama(arguments)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    out = arguments.out or Path(__file__).parent / "results" / f"rules-{arguments.length}.json"
    found = json.loads(out.read_text())["rules"] if only and out.exists() else {}
    chosen = {name: make for name, make in CASES.items() if not only or name in only}
    for name, make in track(chosen.items(), "rules"):
        found[name] = measured(make(base), arguments)
    table = new_table(f"one step, {arguments.batch} x {arguments.length} tokens", "variant", "ms", "over the first")
    for name, variants in found.items():
        for variant, row in variants.items():
            low, middle, high = row["ratio"]
            table.add_row(name, variant, f"{row['ms']:.0f}", f"{middle:.3f} ({low:.3f}-{high:.3f})")
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(arguments), "rules": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
