"""Switching between 1, 8 and 64 adapters that a model holds, beside PEFT: time, and memory of the adapters.

    python benchmarks/switching.py
    python benchmarks/switching.py --layers 4 --hidden 128 --counts 1,4     # to check the script

A Llama with LoRA on all linear layers, of rank 8 and 16 in turn, holds the same adapters in both libraries. Each must
answer alike. Then they take turns: to the next adapter, to a weighted pair, to the base alone and back. PEFT's pair is
`add_weighted_adapter` with `cat`, which is exact, and `set_adapter`; dropping it again is not timed. Last, a compiled
model switches, and its compilations are counted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track

import lorary
from cases import ALL_LINEAR, MiB, llama, machine, new_table, ratio

PAIR = {"a0": 0.7, "a1": 0.3}
RANKS = (8, 16)


def resident() -> int:
    """The resident memory of this process in bytes; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def adapters(base: Any, count: int) -> dict[str, lorary.Adapter]:
    """name -> an adapter with random factors."""
    found = {}
    for i in range(count):
        r = RANKS[i % len(RANKS)]
        model = copy.deepcopy(base)
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=r, alpha=2 * r)))
        adapter = lorary.Adapter.of(model)
        generator = torch.Generator().manual_seed(i)
        tensors = {
            site: {role: torch.randn(t.shape, generator=generator) * 0.02 for role, t in roles.items()}
            for site, roles in adapter.tensors.items()
        }
        found[f"a{i}"] = dataclasses.replace(adapter, tensors=tensors)
    return found


def in_peft(base: Any, values: dict[str, lorary.Adapter]) -> Any:
    """PEFT's model with these adapters."""
    model: Any = copy.deepcopy(base)
    for name, value in values.items():
        r = value.sites[0].r
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=ALL_LINEAR)
        if name == "a0":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for site, roles in value.tensors.items():
            layer = model.base_model.model.get_submodule(site)
            layer.lora_A[name].weight.data.copy_(roles["A"])
            layer.lora_B[name].weight.data.copy_(roles["B"])
    return model.eval()


def in_lorary(base: Any, values: dict[str, lorary.Adapter]) -> Any:
    """The model that holds these adapters."""
    model = copy.deepcopy(base).eval()
    lorary.named_adapters(model).update(values)
    for name in values:  # the first switch from the plain base attaches; the others find its layers
        lorary.switch(model, name)
    return model


def grown(make: Callable[[], Any]) -> tuple[Any, int]:
    """What a function makes, and by how many bytes the resident memory has grown."""
    gc.collect()
    before = resident()
    made = make()
    gc.collect()
    return made, resident() - before


@torch.no_grad()
def agree(values: dict[str, lorary.Adapter], ours: Any, theirs: Any) -> None:
    """Stop unless both libraries answer alike."""
    ids = torch.arange(16)[None]
    for name in [*values][:2]:
        lorary.switch(ours, name)
        theirs.set_adapter(name)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-4)
    if len(values) > 1:
        lorary.switch(ours, PAIR)
        add_pair(theirs)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-4)
        theirs.delete_adapter("pair")


def add_pair(theirs: Any) -> None:
    """PEFT's weighted pair, exact and active."""
    theirs.add_weighted_adapter(list(PAIR), list(PAIR.values()), "pair", combination_type="cat")
    theirs.set_adapter("pair")


def turns(values: dict[str, lorary.Adapter], ours: Any, theirs: Any, repeats: int) -> dict[str, dict[str, list[float]]]:
    """What was asked for -> library -> seconds of every repeat."""
    names = list(values)
    seconds: dict[str, dict[str, list[float]]] = {}

    def note(what: str, library: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        seconds.setdefault(what, {}).setdefault(library, []).append(time.perf_counter() - start)

    def block(disabled: Any) -> None:
        with disabled:
            pass

    for i in range(repeats):
        name = names[i % len(names)]
        note("one adapter", "lorary", functools.partial(lorary.switch, ours, name))
        note("one adapter", "PEFT", functools.partial(theirs.set_adapter, name))
        note("a block of the base", "lorary", lambda: block(lorary.disabled(ours)))
        note("a block of the base", "PEFT", lambda: block(theirs.disable_adapter()))
        if len(values) > 1:
            note("a weighted pair", "lorary", lambda: lorary.switch(ours, PAIR))
            note("a weighted pair", "PEFT", lambda: add_pair(theirs))
            theirs.delete_adapter("pair")
        note("to the base", "lorary", lambda: lorary.switch(ours, None))
        note("from the base", "lorary", functools.partial(lorary.switch, ours, name))
        note("one adapter, by value", "lorary", functools.partial(lorary.switch, ours, values[name]))
    return seconds


def held(base: Any, count: int, repeats: int) -> dict[str, Any]:
    """Times and memory with so many adapters."""
    values = adapters(base, count)
    ours, our_growth = grown(lambda: in_lorary(base, values))
    theirs, their_growth = grown(lambda: in_peft(base, values))
    agree(values, ours, theirs)
    seconds = turns(values, ours, theirs, repeats)
    size = sum(
        t.nbytes
        for value in lorary.named_adapters(ours).values()
        for roles in value.tensors.values()
        for t in roles.values()
    )
    return {
        "ms": {
            what: {library: 1e3 * statistics.median(s) for library, s in found.items()}
            for what, found in seconds.items()
        },
        "lorary_over_peft": {
            what: ratio(found["lorary"], found["PEFT"]) for what, found in seconds.items() if "PEFT" in found
        },
        "tensors": {
            "lorary": size,
            "PEFT": sum(p.nbytes for name, p in theirs.named_parameters() if "lora_" in name),
        },
        "resident": {"lorary": our_growth, "PEFT": their_growth},
    }


@torch.no_grad()
def compiled(base: Any, count: int, repeats: int, rank: int | None) -> dict[str, Any]:
    """A compiled model: milliseconds of a switch, and compilations after the first forward pass with an adapter."""
    torch._dynamo.reset()
    values = adapters(base, count)
    model = torch.compile(copy.deepcopy(base).eval())
    mine = lorary.named_adapters(model)
    mine.update(values)
    mine.rank = rank
    ids = torch.arange(16)[None]
    lorary.switch(model, "a0")
    model(ids)
    counters = torch._dynamo.utils.counters["stats"]
    before, seconds = counters["unique_graphs"], []
    for i in range(repeats):
        choice = PAIR if rank and i % 4 == 3 else f"a{i % count}"
        start = time.perf_counter()
        lorary.switch(model, choice)
        seconds.append(time.perf_counter() - start)
        model(ids)
    return {"ms": 1e3 * statistics.median(seconds), "compilations": counters["unique_graphs"] - before}


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--counts", default="1,8,64", help="how many adapters are held")
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "switching.json")
    arguments = made.parse_args()
    arguments.device, arguments.dtype = torch.device("cpu"), "float32"
    base = llama(arguments)
    counts = [int(count) for count in arguments.counts.split(",")]
    found = {count: held(base, count, arguments.repeats) for count in track(counts, "switching")}
    table = new_table("milliseconds", "held", "lorary", "PEFT", "lorary over PEFT")
    for count, row in found.items():
        for what, ms in row["ms"].items():
            low, middle, high = row["lorary_over_peft"].get(what, [0, 0, 0])
            over = f"{middle:.3f} ({low:.3f}-{high:.3f})" if middle else "-"
            theirs = f"{ms['PEFT']:.1f}" if "PEFT" in ms else "-"
            table.add_row(what, str(count), f"{ms['lorary']:.1f}", theirs, over)
        for what in ("tensors", "resident"):
            table.add_row(
                f"{what}, MiB", str(count), *(f"{row[what][library] / MiB:.1f}" for library in ("lorary", "PEFT")), "-"
            )
    Console().print(table)
    small = llama(argparse.Namespace(**vars(arguments) | {"layers": min(arguments.layers, 2)}))
    ways = {"as they are": None, "padded to rank 32": 32}
    counted = {way: compiled(small, 8, 40, rank) for way, rank in ways.items()}
    Console().print(counted)
    result = {"machine": machine(arguments), "switching": found, "compiled": counted}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
