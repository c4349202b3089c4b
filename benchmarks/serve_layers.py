"""Microseconds of one linear layer in a mixed batch: idle, with 1, 8 and 32 adapters, merged; beside PEFT's.

    python benchmarks/serve_layers.py

A step of token-by-token generation has 32 rows, each of another request; a prefill has 8 prompts of 64 tokens. Layers
take turns, as in a model, so that weights come from memory. All of it is measured in turn, in seconds of the processor,
and the least of several rounds is kept: other work on the machine can only add to it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cases import machine, new_table
from lorary.serve.batch.batch import Batch, Weighted
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.batch.ops import cpu
from lorary.serve.forms.serving_form import ServingForm, SiteForm

ADAPTERS = (1, 8, 32)
PEFT_ADAPTERS = (4, 8, 32)
PHASES = {"generation": (32, 1), "prefill": (8, 64)}  # requests, rows of each
CACHES = 64 * 2**20  # bytes of weights, more than a processor's caches

Call = Callable[[int], Any]  # runs the layer of this number


class Layers(nn.Module):
    """As many layers as exceed the caches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        count = max(2, min(40, CACHES // (4 * width * width)))
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))


def forms(model: Layers, width: int, rank: int) -> list[ServingForm]:
    """As many adapters of all layers as there are in the largest batch."""

    def site() -> SiteForm:
        return SiteForm(torch.randn(rank, width), torch.randn(width, rank) / rank)

    paths = [f"layers.{i}" for i in range(len(model.layers))]
    return [ServingForm(str(number), {path: site() for path in paths}) for number in range(max(ADAPTERS))]


def batches(made: list[ServingForm], requests: int, rows: int) -> Iterator[tuple[str, Batch]]:
    """(name, batch) of each number of adapters; requests are sorted by adapter, as the scheduler does."""
    for count in ADAPTERS:
        if count <= requests:
            chosen: list[Weighted] = [((made[number * count // requests], 1.0),) for number in range(requests)]
            yield str(count), Batch.of([(weighted, rows, rows) for weighted in chosen])


def peft(width: int, rank: int, x: Tensor, requests: int) -> Iterator[tuple[str, Call]]:
    """(name, PEFT's mixed batch) of each number of adapters: the layer itself, without the model around it."""
    config = LoraConfig(r=rank, target_modules=r".*layers\.\d+", init_lora_weights=False)
    model: Any = get_peft_model(Layers(width), config, adapter_name="0")
    for number in range(1, min(max(PEFT_ADAPTERS), requests)):
        model.add_adapter(str(number), config)
    layers, batch = model.eval().base_model.model.layers, x.view(requests, -1, width)
    for count in PEFT_ADAPTERS:
        if count <= requests:
            names = [str(number * count // requests) for number in range(requests)]
            yield f"PEFT, {count}", lambda i, names=names: layers[i](batch, adapter_names=names)  # type: ignore[misc]


def seconds(call: Call, count: int, least: float) -> float:
    """Seconds of the processor for one call, each time of the next layer."""
    turns, calls, begun = itertools.cycle(range(count)), 0, time.process_time()
    while (taken := time.process_time() - begun) < least:
        for _ in range(count):
            call(next(turns))
        calls += count
    return taken / calls


@torch.no_grad()
def measure(width: int, rank: int, phase: str, rounds: int) -> dict[str, float]:
    """name -> microseconds of one layer."""
    requests, rows = PHASES[phase]
    torch.manual_seed(0)
    model, x = Layers(width).eval(), torch.randn(requests * rows, width)
    plain = Layers(width).eval()
    made, served = forms(model, width, rank), ServedLayers(model)
    for form in made:
        served.cover(form)
    others = dict(peft(width, rank, x, requests))
    count, best = len(model.layers), dict[str, float]()
    merging_model = Layers(width).eval()
    merging = ServedLayers(merging_model, merged_budget=2 * CACHES, merge_after=0)
    merging.cover(made[0])
    alone = next(batches(made, requests, rows))[1]
    for i in range(count):  # a few layers at each step
        with merging.computing(alone):
            merging_model.layers[i](x)

    def note(name: str, call: Call) -> None:
        best[name] = min(best.get(name, 1e9), 1e6 * seconds(call, count, 0.02))

    for _ in range(rounds):
        note("base", lambda i: plain.layers[i](x))
        note("idle", lambda i: model.layers[i](x))
        for name, batch in batches(made, requests, rows):
            with served.computing(batch):
                note(name, lambda i: model.layers[i](x))
        with merging.computing(alone):
            note("1, merged", lambda i: merging_model.layers[i](x))
        for name, call in others.items():
            note(name, call)
    return best


def table(found: dict[str, dict[str, float]]) -> Table:
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    made = new_table("microseconds of one linear layer, fp32, one thread (over the base)", *names)
    for case, times in found.items():
        base = times["base"]
        cells = [f"{t:.1f} ({t / base - 1:+.0%})" if (t := times.get(name)) else "-" for name in names]
        made.add_row(case, *cells)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_layers.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = itertools.product(PHASES, (192, 1024, 2048), (16, 64))
    found = {
        f"{phase}, {width} wide, r={rank}": measure(width, rank, phase, arguments.rounds)
        for phase, width, rank in cases
        if (phase, rank) != ("prefill", 64)
    }
    Console(width=180).print(table(found))
    compiled = cpu.native() is not None
    result = {"machine": machine(arguments), "compiled": compiled, "microseconds": found}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
