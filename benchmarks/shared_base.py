"""A training step of several adapters at once on one base beside the same steps in turn, in one process.

    python benchmarks/shared_base.py                     # on the CPU, one thread: five minutes
    python benchmarks/shared_base.py --device cuda --dtype bfloat16
    python benchmarks/shared_base.py --quick             # to check the script

A repeat is one step of all adapters together and one of each by itself, in an order that turns; what is reported is
the median over the repeats of the ratio of their times within a repeat, with its quartiles. Times are those of the
processor, which other programs on the machine change little; of a GPU those of a clock. Both start from equal values
and see the same batches, so their losses must agree, or the script stops. The memory is that of tensors alive in a
step, beyond what is alive between steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lorary
from cases import MiB, llama, machine, new_table, parser, ratio
from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.builtin import FOLDER
from lorary.model.labelled_head import LabelledHead
from lorary.train.shared_base.shared_base import SharedBase
from lorary.train.shared_base.training import Settings, SharedTraining

METHODS = {
    "LoRA": [lorary.method("lora", r=8)],
    "DoRA": [lorary.method("dora", r=8)],
    "VeRA": [lorary.method("vera", r=64)],
    "mixed": [lorary.method(name, r=8) for name in ("lora", "dora", "multilora", "olora")],
}
# method, base, adapters, rows of a batch, tokens of a row
CASES = [
    *(("LoRA", "builtin", 8, rows, length) for rows, length in ((1, 16), (1, 32), (2, 64), (4, 128))),
    *(("LoRA", "builtin", count, 1, 32) for count in (2, 4, 16)),
    *(("LoRA", "wide", 8, rows, length) for rows, length in ((1, 16), (2, 64))),
    *((name, "builtin", 8, rows, length) for name in METHODS for rows, length in ((1, 32), (2, 64)) if name != "LoRA"),
]
STEPS = 10**6  # of the runs that the optimizers are told of


class InTurn:
    """Adapters that are trained one by one, each on an ordinary model; their bases share no memory."""

    def __init__(self, base: Any, plans: dict[str, Any], settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, Any] = {}
        for seed, (name, plan) in enumerate(plans.items()):
            model = lorary.attach(copy.deepcopy(base), plan, seed=seed).train()
            LabelledHead(model, ()).install()
            self.models[name] = model
        self.optimizers = {
            name: lorary.optimizer(model, settings.lr, weight_decay=settings.weight_decay)
            for name, model in self.models.items()
        }

    def step(self, batches: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step of every adapter."""
        return {name: self._step(name, batch) for name, batch in batches.items()}

    def _step(self, name: str, batch: dict[str, Tensor]) -> float:
        model, optimizer = self.models[name], self.optimizers[name]
        loss = model(**batch, fused_lm_head=True).loss
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
        value = loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return value


def loaded(name: str, arguments: argparse.Namespace) -> nn.Module:
    """A base by its name."""
    if name == "wide":
        return llama(arguments)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    return model.to(arguments.device, getattr(torch, arguments.dtype)).requires_grad_(False)


def measured(
    base: Any, methods: list[Any], shape: tuple[int, int, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The times of both ways, and the bytes of both."""
    count, rows, length = shape
    plans = {f"{i}": lorary.plan(base, methods[i % len(methods)]) for i in range(count)}
    settings = Settings(1e-4, STEPS, schedule="constant")
    together = SharedTraining(SharedBase(base, plans, seeds={name: int(name) for name in plans}), settings)
    runners = {"together": together, "in turn": InTurn(base, plans, settings)}
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in runners}
    peaks: dict[str, int] = {}
    for turn in range(arguments.repeats + 2):
        ids = torch.randint(1, 500, (count, rows, length), generator=generator).to(arguments.device)
        batches = {name: {"input_ids": own, "labels": own} for name, own in zip(plans, ids, strict=True)}
        losses = {}
        for name in sorted(runners, reverse=bool(turn % 2)):
            if turn == 1:  # the first step is proved
                with LiveBytes() as live:
                    losses[name] = runners[name].step(batches)
                peaks[name] = live.peak
                continue
            start = _now(arguments)
            losses[name] = runners[name].step(batches)
            times[name].append(_now(arguments) - start)
        _same_work(losses["together"], losses["in turn"], arguments)
    times = {name: wall[1:] for name, wall in times.items()}
    return {
        "ms": {name: 1e3 * statistics.median(wall) for name, wall in times.items()},
        "in_turn_over_together": ratio(times["in turn"], times["together"]),
        "peak_bytes": peaks,
    }


def _same_work(one: dict[str, float], other: dict[str, float], arguments: argparse.Namespace) -> None:
    most = 1e-4 if arguments.dtype == "float32" else 2e-2
    if wrong := [name for name, loss in one.items() if abs(loss - other[name]) > most * abs(loss)]:
        raise SystemExit(f"the losses of {', '.join(wrong)} differ, so the two did not do the same work")


def _now(arguments: argparse.Namespace) -> float:
    """Seconds."""
    if arguments.device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    made = parser(__doc__, "methods", "shared_base.json")
    made.set_defaults(hidden=512, layers=4, repeats=7)
    made.add_argument("--quick", action="store_true", help="one case and few repeats, to check the script")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    arguments.repeats = 2 if arguments.quick else arguments.repeats
    cases = [case for case in CASES[: 1 if arguments.quick else None] if not only or case[0] in only]
    bases = {name: loaded(name, arguments) for name in {case[1] for case in cases}}
    found = []
    for method, base, count, rows, length in track(cases, "shared base"):
        row = measured(bases[base], METHODS[method], (count, rows, length), arguments)
        found.append({"base": base, "method": method, "adapters": count, "rows": rows, "length": length, **row})
    table = new_table(
        "one step of all adapters",
        "base",
        "adapters",
        "tokens each",
        "in turn, ms",
        "together, ms",
        "faster",
        "peak, MiB",
    )
    for row in found:
        low, middle, high = row["in_turn_over_together"]
        peaks = " / ".join(f"{row['peak_bytes'][name] / MiB:.0f}" for name in ("in turn", "together"))
        times = (f"{row['ms'][name]:.0f}" for name in ("in turn", "together"))
        shape = f"{row['rows']} x {row['length']}"
        table.add_row(
            row["method"],
            row["base"],
            f"{row['adapters']}",
            shape,
            *times,
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
            peaks,
        )
    Console(width=140).print(table)
    if not arguments.quick:
        out = arguments.out or Path(__file__).parent / "results" / "shared_base.json"
        out.write_text(json.dumps({"machine": machine(arguments), "steps": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
