"""What stays of each method in inference: the time of one forward pass over the base's, adapters attached or merged.

    python benchmarks/baselines.py                # a Llama of 4 blocks, width 1024, in float32 on the CPU
    python benchmarks/baselines.py --repeats 4 --hidden 256     # to check the script

One token and a prompt. All variants run in turns, in an order that turns; what is reported is the median over the
repeats of the ratio to the base's time within a repeat, with the quartiles of that ratio, and the exact number of
floating-point operations over the base's.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

import lorary
from cases import ALPHA, RANK, llama, machine, new_table, parser, ratio

LENGTHS = {1: 8, 128: 2}  # tokens -> how many times the repeats: a short pass is a noisy one


def methods() -> dict[str, lorary.Method]:
    """variant -> its method."""
    return {
        "LoRA": lorary.method("lora", r=RANK, alpha=ALPHA),
        "(IA)³": lorary.method("ia3"),
        "Houlsby, m=64": lorary.method("houlsby"),
        "Houlsby, m=64, feed-forward only": lorary.method("houlsby", position="feed-forward"),
    }


def variants(base: Any) -> dict[str, Any]:
    """variant -> the model that computes it; merged where the method has a merged form."""
    found = {"base": base}
    for name, method in methods().items():
        model = copy.deepcopy(base)
        found[name] = lorary.attach(model, lorary.plan(model, method)).eval()
        if not (method.join and method.join.why_not_merged):
            found[f"{name}, merged"] = lorary.merge(copy.deepcopy(model)).eval()
    return found


@torch.inference_mode()
def measured(models: dict[str, Any], ids: Any, repeats: int) -> dict[str, Any]:
    """variant -> milliseconds of a forward pass, and the quartiles of its ratio to the base's."""
    wall: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for turn in range(repeats + 2):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            start = time.perf_counter()
            models[name](ids, use_cache=False)
            wall[name].append(time.perf_counter() - start)
    times = {name: seconds[2:] for name, seconds in wall.items()}
    operations = {name: flops(model, ids) for name, model in models.items()}
    return {
        name: {
            "ms": 1e3 * statistics.median(seconds),
            "ratio": ratio(seconds, times["base"]),
            "operations": operations[name] / operations["base"],
        }
        for name, seconds in times.items()
    }


def flops(model: Any, ids: Any) -> int:
    """The floating-point operations of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    return counter.get_total_flops()


def main() -> None:
    arguments = parser(__doc__, "lengths", "baselines.json").parse_args()
    torch.set_num_threads(arguments.threads)
    models = variants(llama(arguments).eval())
    found = {}
    for length, times in track(LENGTHS.items(), "lengths"):
        ids = torch.randint(2048, (arguments.batch, length), device=arguments.device)
        found[str(length)] = measured(models, ids, times * arguments.repeats)
    table = new_table("one forward pass over the base's", *(f"{length} tokens" for length in LENGTHS), "operations")
    for name in models:
        cells = [found[str(length)][name] for length in LENGTHS]
        shown = ("{1:.3f} ({0:.3f}-{2:.3f})".format(*cell["ratio"]) for cell in cells)
        table.add_row(name, *shown, f"{cells[0]['operations']:.4f}")
    Console().print(table)
    out = arguments.out or Path(__file__).parent / "results" / "baselines.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(arguments), "forward": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
