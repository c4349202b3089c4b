"""Attention in shifted groups beside full attention: forward and backward by length, whole training steps, and memory.

    python benchmarks/longlora.py                  # 1k to 16k tokens, float32, one thread: a quarter of an hour
    python benchmarks/longlora.py --small          # 64 to 512 tokens, to see that it runs: its figures say nothing
    python benchmarks/longlora.py --device cuda --dtype bfloat16 --longest 131072 --step 32768

Full attention is PyTorch's own causal product, as Transformers calls it: the fused kernel that has no L x L matrix
either. Variants take turns within a repeat, in an order that turns; ratios are of one repeat.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lorary
from cases import MiB, machine, ratio
from lorary.kernels.shifted_attention import group_size, shifted
from memory import Run, build, compared
from step import Runner

GROUPS, FIXED = 4, 1024  # G = L / GROUPS as LongLoRA has it, and one G for all lengths
HEADS, KEY_HEADS, WIDTH = 8, 4, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WHOLE = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, heads, L, width] -> [batch, L, heads, width]: a token sees all tokens before it."""
    y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def attentions(length: int, fixed: int) -> dict[str, Attention]:
    """The ways of attending that are compared at one length."""
    return {
        "full": full,
        f"G = L/{GROUPS}": lambda q, k, v: shifted(q, k, v, group_size(length, GROUPS)),
        f"G = {fixed:,}": lambda q, k, v: shifted(q, k, v, fixed),
    }


def in_turns(named: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, after one turn to warm up."""
    order, found = list(named), {name: [] for name in named}
    for turn in range(repeats + 1):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            seconds = named[name]()
            found[name] += [seconds] if turn else []
    return found


def attention(length: int, fixed: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of forward and backward of one layer's attention, by variant."""
    words = {"device": options.device, "dtype": getattr(torch, options.dtype), "requires_grad": True}
    # token by token in memory, as a model's projections make them
    qkv = [torch.randn(1, length, n, WIDTH, **words).transpose(1, 2) for n in (HEADS, KEY_HEADS, KEY_HEADS)]
    gradient = torch.randn(1, length, HEADS, WIDTH, device=options.device, dtype=words["dtype"])

    def timed(attend: Attention) -> Callable[[], float]:
        def once() -> float:
            synchronise(options.device)
            start = time.perf_counter()
            torch.autograd.grad(attend(*qkv), qkv, gradient)
            synchronise(options.device)
            return time.perf_counter() - start

        return once

    return in_turns({name: timed(attend) for name, attend in attentions(length, fixed).items()}, options.repeats)


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """a of the least-squares fit seconds ~ L^a: 1 where a token costs the same at every length."""
    fit = statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds])
    return fit.slope


def steps(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """One training step of a small Llama whose length is four times what it knows, and the same with full attention."""
    arms = {"PEFT's LoRA": None, "full attention": False, "shifted groups": True}
    ids = torch.randint(1, 4000, (1, run.length), device=options.device)
    runners = {}
    for name, grouped in arms.items():
        torch.manual_seed(0)
        model = build(run).to(options.device)
        if grouped is None:
            config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=WHOLE)
            model = get_peft_model(model, config)
            trained: Any = [p for p in model.parameters() if p.requires_grad]
        else:
            method = lorary.method("longlora", length=run.length, r=8, alpha=16, shifted=grouped)
            lorary.attach(model, lorary.plan(model, method))
            trained = lorary.param_groups(model, lr=1e-4)
        runners[name] = Runner(model.train(), ids, trained)
    peaks = {name: runner.peak() for name, runner in runners.items()}

    def timed(runner: Runner) -> Callable[[], float]:
        def once() -> float:
            runner.step()
            return runner.wall[-1]

        return once

    seconds = in_turns({name: timed(runner) for name, runner in runners.items()}, options.repeats)
    assert all(math.isfinite(loss) for runner in runners.values() for loss in runner.losses)
    return {"seconds": seconds, "peak_bytes": peaks}


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def shown(low_middle_high: list[float]) -> str:
    """A median with its quartiles."""
    low, middle, high = low_middle_high
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def attention_table(found: dict[int, dict[str, list[float]]]) -> Table:
    """Milliseconds per thousand tokens by length, the ratios, and how each grows."""
    lengths, names = list(found), list(next(iter(found.values())))
    table = Table("tokens", title=f"attention, forward and backward, {HEADS} heads of {WIDTH}, {KEY_HEADS} key heads")
    for name in names:
        table.add_column(f"{name}, ms per 1,000 tokens", justify="right")
    for name in names[1:]:
        table.add_column(f"full over {name}", justify="right")
    for length in lengths:
        row = found[length]
        each = [f"{1e6 * statistics.median(row[name]) / length:.1f}" for name in names]
        table.add_row(f"{length:,}", *each, *(shown(ratio(row["full"], row[name])) for name in names[1:]))
    fits = [exponent(lengths, [statistics.median(found[n][name]) for n in lengths]) for name in names]
    table.add_section()
    table.add_row("time ~ L^", *(f"{fit:.2f}" for fit in fits), *([""] * (len(names) - 1)))
    return table


def step_table(found: dict[str, Any], length: int) -> Table:
    """Times of whole steps."""
    table = Table("one training step", "ms", "over shifted groups", "peak, MiB", title=f"{length:,} tokens")
    for name, wall in found["seconds"].items():
        over = shown(ratio(wall, found["seconds"]["shifted groups"]))
        table.add_row(name, f"{1e3 * statistics.median(wall):,.0f}", over, f"{found['peak_bytes'][name] / MiB:,.0f}")
    return table


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """Peaks beside what is predicted, weights and optimizer included."""
    table = Table("peak of a training run", "measured, MiB", "predicted", "error", title="memory")
    for row in rows:
        size = (f"{row[key] / MiB:,.1f}" for key in ("measured", "formula"))
        table.add_row(row["run"], *size, f"{row['error']:+.2%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, default=16_384, help="tokens; from 1,024 on, doubled up to there")
    parser.add_argument("--step", type=int, default=8192, help="tokens of a whole training step")
    parser.add_argument("--small", action="store_true", help="512 tokens at most: to see that it runs")
    parser.add_argument("--out", type=Path, help="default: results/longlora.json; nothing with --small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shortest, longest, fixed = (64, 512, 64) if options.small else (1024, options.longest, FIXED)
    length = 256 if options.small else options.step
    console = Console(width=140)

    lengths = [shortest * 2**i for i in range((longest // shortest).bit_length())]
    found = {n: attention(n, fixed, options) for n in track(lengths, "attention", console=console)}
    console.print(attention_table(found))

    run = Run("longlora", batch=1, length=length, dtype=options.dtype)
    step = steps(run, options)
    gc.collect()
    console.print(step_table(step, length))

    words = {"r": 8, "alpha": 16, "length": length}
    runs = [
        Run("longlora", words | {"shifted": grouped}, batch=1, length=length, dtype=options.dtype, targets="attention")
        for grouped in (True, False)
    ]
    names = ("longlora, shifted groups", "longlora, full attention")
    memory = [compared(run, options.device) | {"run": name} for run, name in zip(runs, names, strict=True)]
    console.print(memory_table(memory))

    out = options.out or (None if options.small else Path(__file__).parent / "results" / "longlora.json")
    if out:
        record = {"machine": machine(options), "attention": found, "step": {"tokens": length} | step, "memory": memory}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
