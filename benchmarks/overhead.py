"""Microseconds that an adapter adds to one small layer, lorary beside PEFT: where Python and launches are the cost.

    python benchmarks/overhead.py                      # one linear 64 x 64, one row, one thread
    python benchmarks/overhead.py --device cuda --dtype bfloat16
    python benchmarks/overhead.py --compile            # torch.compile on both sides, the forward pass
    python benchmarks/overhead.py --sweep              # plain operations beside fused nodes, by size of the output

The plain layer, lorary's and PEFT's take turns; every turn is the mean of many calls, and what is reported is the
median of the turns' ratios with their quartiles. `theirs` is the bare layer, without PEFT's model around it. Where PEFT
lacks a method, its LoRA of the same rank stands in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import lorary
from cases import ALPHA, CASES, RANK, Case, machine, new_table, ratio
from layer import Kernels
from lorary.kernels import low_rank

warnings.filterwarnings("ignore", message=".*MatMul8bitLt|.*gemm_4bit")
MODES = ("inference", "training", "autocast", "dropout", "NF4")
Call = Callable[[], object]


def layers(case: Case, mode: str, arguments: argparse.Namespace) -> list[Any]:
    """The plain layer, lorary's and PEFT's (None without a counterpart) of one mode, on a device."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(arguments.width, arguments.width, device=arguments.device, dtype=arguments.dtype)
        return nn.Sequential(OrderedDict(linear=linear)).requires_grad_(False)

    method, plain, theirs = case.method, base(), None
    if mode == "dropout":
        method = method.replace(dropout=0.1)
    if mode == "NF4":
        method = method.replace(storage=lorary.NF4())
        lorary.quantize(plain)
    ours = base()
    lorary.attach(ours, lorary.plan(ours, method, ["linear"]))
    if case.peft is not None:
        theirs = of_peft(case.peft(["linear"]), bnb_nf4(base()) if mode == "NF4" else base(), mode)
    models = [plain, ours, theirs]
    for model in models:
        if model is not None:
            model.train(mode != "inference")
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p) * 0.05)
    return [model if model is None else model.linear for model in models]


def of_peft(config: Any, model: nn.Module, mode: str) -> Any:
    """The model with PEFT's adapter; None where PEFT refuses the combination."""
    if mode == "dropout":
        name = next((n for n in ("lora_dropout", "vera_dropout") if hasattr(config, n)), None)
        if name is None:
            return None
        setattr(config, name, 0.1)
    try:
        return get_peft_model(model, config).base_model.model
    except (TypeError, ValueError):
        return None


def bnb_nf4(model: Any) -> nn.Module:
    """The model with bitsandbytes' 4-bit layer, as PEFT's users have it."""
    import bitsandbytes as bnb

    dense = model.linear
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, compute_dtype=dense.weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.bias = dense.bias
    model.linear = layer.to(dense.weight.device)
    return model  # type: ignore[no-any-return]


def call(layer: Any, mode: str, x: Tensor, g: Tensor) -> Call:
    """What one call of a layer does in this mode."""

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    def training() -> None:
        layer(x).backward(g)

    def autocast() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(x)
        y.backward(g.to(y.dtype))

    return {"inference": inference, "autocast": autocast}.get(mode, training)


def timed(calls: list[Call], repeats: int, number: int, device: torch.device) -> list[list[float]]:
    """Microseconds of a call of each, taken in turns."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for i in range(len(calls)):
            i = (i + turn) % len(calls)
            synchronise(device)
            start = time.perf_counter()
            for _ in range(number):
                calls[i]()
            synchronise(device)
            found[i].append(1e6 * (time.perf_counter() - start) / number)
    return [times[1:] for times in found]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def operators(run: Call) -> int:
    """The operators that one call dispatches, backward included."""
    with Kernels() as kernels:
        run()
    return kernels.count


def launches(run: Call, device: torch.device) -> tuple[int, int] | None:
    """(kernel launches, host synchronisations) of one call on CUDA."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
    events = {event.key: event.count for event in found.key_averages()}
    syncs = sum(n for key, n in events.items() if "Synchronize" in key)
    return sum(n for key, n in events.items() if "LaunchKernel" in key), syncs - 1  # the profiler's own


def measure(case: Case, mode: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """One method in one mode; None where the method is not possible there."""
    try:
        models = layers(case, mode, arguments)
    except lorary.LoraryError:
        return None
    made = {"device": arguments.device, "dtype": arguments.dtype}
    x = torch.randn(arguments.rows, arguments.width, requires_grad=mode != "inference", **made)
    g = torch.randn(arguments.rows, arguments.width, **made)
    present = [model for model in models if model is not None]
    if arguments.compile:
        torch._dynamo.reset()
        present = [torch.compile(model) for model in present]
    calls = [call(model, mode, x, g) for model in present]
    times = timed(calls, arguments.repeats, arguments.number, arguments.device)
    medians = [statistics.median(t) for t in times]
    found: dict[str, Any] = {
        "us": medians,
        "over_plain_us": [m - medians[0] for m in medians[1:]],
        "over_peft": ratio(times[1], times[2]) if len(times) > 2 else None,
    }
    if not arguments.compile:
        found["operators"] = [operators(run) for run in calls]
        found["launches_and_syncs"] = [launches(run, arguments.device) for run in calls]
    return found


def chosen() -> list[Case]:
    """The methods, each beside PEFT's own or PEFT's LoRA of the same rank."""

    def lora(r: int) -> Callable[[Any], Any]:
        return lambda targets: LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets)

    known = [case for case in CASES if "dropout" not in case.name]
    return [Case(c.name, c.method, c.peft or lora(48 if "Multi" in c.name else RANK)) for c in known]


def table(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    title = f"one linear {arguments.width} x {arguments.width}, {arguments.rows} rows, {arguments.dtype}, us per call"
    made = new_table(title, "mode", "plain", "lorary", "PEFT", "lorary over PEFT", "operators: plain | lorary | PEFT")
    for name, modes in found.items():
        for mode, row in modes.items():
            us = [f"{t:.1f}" for t in row["us"]] + ["-"] * (3 - len(row["us"]))
            r = row["over_peft"]
            over = "-" if r is None else f"{r[1]:.2f} ({r[0]:.2f}-{r[2]:.2f})"
            made.add_row(name, mode, *us, over, " | ".join(map(str, row.get("operators", ()))))
    Console(width=140).print(made)


def sweep(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Time of plain operations over that of the fused node by elements of the output, for LoRA's training step."""
    found: dict[str, list[float]] = {}
    made = {"device": arguments.device, "dtype": arguments.dtype}
    for width in (256, 1024, 2816):
        W = torch.randn(width, width, **made)
        A = torch.randn(RANK, width, requires_grad=True, **made)
        B = torch.randn(width, RANK, requires_grad=True, **made)
        for rows in (16, 64, 256, 1024, 2048):
            x, g = torch.randn(rows, width, requires_grad=True, **made), torch.randn(rows, width, **made)

            def step(fused_from: int, W: Tensor = W, A: Tensor = A, B: Tensor = B, x: Tensor = x, g: Tensor = g) -> Any:
                low_rank.FUSED_FROM = fused_from
                low_rank.add_low_rank(nn.functional.linear(x, W), x, A, B, 2.0).backward(g)

            number = max(1, 2**21 // (rows * width))
            times = timed([lambda: step(2**62), lambda: step(0)], arguments.repeats, number, arguments.device)
            found[f"{rows} x {width}"] = ratio(times[0], times[1])
    for size, r in found.items():
        print(f"{size:>12}: plain over fused {r[1]:.2f} ({r[0]:.2f}-{r[2]:.2f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--number", type=int, default=200, help="calls in a turn")
    parser.add_argument("--modes", default=";".join(MODES), help=f"some of {';'.join(MODES)}")
    parser.add_argument("--only", default="", help="names of methods, separated by semicolons")
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--sweep", action="store_true", help="plain operations beside fused nodes instead")
    parser.add_argument("--out", type=Path, help="default: results/overhead.json, or overhead-MODE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sweep:
        result: dict[str, Any] = {"sweep": sweep(arguments)}
    else:
        only = [name.strip() for name in arguments.only.split(";") if name.strip()]
        modes = ["inference"] if arguments.compile else arguments.modes.split(";")
        found: dict[str, Any] = {}
        for case in track([c for c in chosen() if not only or c.name in only], "layers"):
            rows = {mode: measure(case, mode, arguments) for mode in modes}
            found[case.name] = {mode: row for mode, row in rows.items() if row is not None}
        table(found, arguments)
        result = {"overhead": found}
    suffix = "-sweep" if arguments.sweep else "-compiled" if arguments.compile else ""
    out = arguments.out or Path(__file__).parent / "results" / f"overhead{suffix}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine(arguments), **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
