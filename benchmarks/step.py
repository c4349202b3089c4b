"""One training step of every method: over the frozen base's forward and backward, and beside PEFT, in one process.

    python benchmarks/step.py                 # a Llama of 4 blocks, width 1024, in float32 on the CPU, 512 tokens
    python benchmarks/step.py --length 64
    python benchmarks/step.py --length 1      # one token, as in decoding: the forward pass alone
    python benchmarks/step.py --device cuda --dtype bfloat16

A machine is never quiet, so the three take turns: each repeat is a step of the base, one of lorary's and one of
PEFT's, in an order that turns; what is reported is the median over the repeats of the ratio of their times within a
repeat, with the quartiles of that ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import lorary
from cases import CASES, Case, MiB, llama, machine, new_table, parser, ratio
from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.layers.adapted import adapted_layers


class Runner:
    """One model, with an optimizer if anything trains, and what its steps took."""

    def __init__(self, model: Any, ids: Tensor, groups: Any) -> None:
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0) if groups else None
        self.wall: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        """Forward, backward and optimizer, timed."""
        if self.ids.shape[1] == 1:
            self.decode()
            return
        _synchronise(self.ids.device)
        start = time.perf_counter()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        _synchronise(self.ids.device)
        self.wall.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def decode(self) -> None:
        """The forward pass of one token, timed."""
        _synchronise(self.ids.device)
        with torch.inference_mode():
            start = time.perf_counter()
            self.model(input_ids=self.ids)
            _synchronise(self.ids.device)
            self.wall.append(time.perf_counter() - start)

    def peak(self) -> int:
        """The most bytes of tensors alive at once in one step, beyond what is alive between steps."""
        with LiveBytes() as live:
            self.step()
        self.wall.pop()
        return live.peak


def frozen(base: nn.Module) -> nn.Module:
    """The base as the floor of every step: its backward pass reaches as far as that of adapters in every layer.

    The first block's projections have frozen inputs, so their gradient starts at their outputs.
    """
    model = copy.deepcopy(base).train()
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr]
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def one_case(base: nn.Module, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of one training step of the base, of lorary and of PEFT, taken in turns from equal starts."""
    ids = torch.randint(2048, (arguments.batch, arguments.length), device=arguments.device)
    ours, theirs = case.ours(base), case.theirs(base)
    runners = [Runner(frozen(base), ids, None), Runner(ours, ids, lorary.param_groups(ours, lr=1e-4))]
    if theirs is not None:
        _same_start(case, ours, theirs)
        runners.append(Runner(theirs, ids, [p for p in theirs.parameters() if p.requires_grad]))
    decoding = arguments.length == 1
    for runner in runners:
        runner.model.train(not decoding)
    with lorary.cached(ours) if arguments.cached else contextlib.nullcontext():
        peaks = [runner.peak() for runner in runners]
        if theirs is not None and case.start and not decoding:
            _same_work(case, runners, arguments)
        for turn in range((10 if decoding else 1) * arguments.repeats + 1):
            first = turn % len(runners)
            for runner in runners[first:] + runners[:first]:
                runner.step()
    times = [runner.wall[1:] for runner in runners]
    result = {
        "ms": [1e3 * statistics.median(t) for t in times],
        "over_base": ratio(times[1], times[0]),
        "peft_over_base": ratio(times[2], times[0]) if theirs is not None else None,
        "over_peft": ratio(times[1], times[2]) if theirs is not None else None,
        "peak_bytes": peaks,
    }
    assert all(math.isfinite(loss) for runner in runners for loss in runner.losses)
    return result


def _same_start(case: Case, ours: Any, theirs: Any) -> None:
    """Gives PEFT's adapters the values of ours, where both start with zeros in the other factor."""
    parameters = dict(theirs.named_parameters())
    for name, layer in adapted_layers(ours).items():
        for role, suffix in case.start.items():
            with torch.no_grad():
                parameters[f"base_model.model.{name}.{suffix}"].copy_(layer.params[role])


def _same_work(case: Case, runners: list[Runner], arguments: argparse.Namespace) -> None:
    a, b = (runner.losses[-1] for runner in runners[1:])
    if not case.random and abs(a - b) / b > (1e-4 if arguments.dtype == "float32" else 2e-2):
        raise SystemExit(f"{case.name}: the losses are {a} and {b}, so the two did not do the same work")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(found: dict[str, Any], arguments: argparse.Namespace) -> Table:
    """Ratios and peaks."""
    title = (
        f"one step, Llama {arguments.layers} x {arguments.hidden}, {arguments.batch} x {arguments.length} tokens, "
        f"all linears, {arguments.dtype} on {arguments.device} ({arguments.repeats} repeats)"
    )
    columns = (
        "lorary, ms",
        "over the frozen base",
        "PEFT over it",
        "lorary over PEFT",
        "peak, MiB: base | lorary | PEFT",
    )
    made = new_table(title, *columns)
    show: Callable[[Any], str] = lambda r: "-" if r is None else f"{r[1]:.3f} ({r[0]:.3f}-{r[2]:.3f})"  # noqa: E731
    for name, row in found.items():
        ratios = (show(row[key]) for key in ("over_base", "peft_over_base", "over_peft"))
        made.add_row(name, f"{row['ms'][1]:.0f}", *ratios, " | ".join(f"{p / MiB:.0f}" for p in row["peak_bytes"]))
    return made


def main() -> None:
    known = parser(__doc__, "cases", "step-LENGTH.json")
    known.add_argument("--cached", action="store_true", help="one token inside `lorary.cached`")
    arguments = known.parse_args()
    torch.set_num_threads(arguments.threads)
    base = llama(arguments)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    chosen = [case for case in CASES if not only or case.name in only]
    found = {case.name: one_case(base, case, arguments) for case in track(chosen, "steps")}
    Console().print(table(found, arguments))
    out = (
        arguments.out
        or Path(__file__).parent / "results" / f"step-{arguments.length}{'-cached' * arguments.cached}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(arguments), "step": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
