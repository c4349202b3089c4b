"""One training step, and what one adapted layer keeps for it: lorary beside PEFT, in the same process.

    python benchmarks/step.py                 # a small Llama in float32 on the CPU
    python benchmarks/step.py --device cuda --dtype bfloat16

A machine is never quiet, so the two libraries take turns: each repeat is one step of one and one step of the
other, in alternating order, and what is reported is the median over the repeats of the ratio of their times
within a repeat, with the quartiles of that ratio. Counts of bytes and kernels are exact and need no repeats.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lorary
from lorary.accounting import LiveBytes, kept_for_backward

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it

RANK, ALPHA = 16, 32
MiB = 2**20


@dataclass(frozen=True)
class Case:
    """One method, in both libraries' words."""

    name: str
    presets: tuple[str, ...]
    dropout: float = 0.0

    @property
    def frozen_a(self) -> bool:
        return "lora-fa" in self.presets


CASES = [
    Case("LoRA", ("lora",)),
    Case("LoRA, dropout 0.1", ("lora",), dropout=0.1),
    Case("rsLoRA", ("rslora",)),
    Case("LoRA-FA", ("lora-fa",)),
    Case("LoRA-FA, dropout 0.1", ("lora-fa",), dropout=0.1),
]


def ours(base: nn.Module, case: Case, targets: Any = "all-linear") -> Any:
    """A copy of the model with lorary's adapters."""
    model = copy.deepcopy(base)
    method = lorary.method(*case.presets, r=RANK, alpha=ALPHA, dropout=case.dropout)
    return lorary.attach(model, lorary.plan(model, method, targets)).train()


def theirs(base: nn.Module, case: Case, targets: Any = "all-linear") -> Any:
    """A copy of the model with PEFT's adapters, at PEFT's defaults; LoRA-FA freezes A as its LoRA-FA helper does."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=case.dropout,
        target_modules=targets,
        use_rslora="rslora" in case.presets,
    )
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if case.frozen_a and ".lora_A." in name:
            parameter.requires_grad_(False)
    return model.train()


# --- one layer: exact counts ------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the operators that compute something; those that only look at or reserve memory are free."""

    FREE = frozenset({"_unsafe_view", "detach", "alias", "empty", "empty_like", "_local_scalar_dense"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in self.FREE)
        return func(*args, **(kwargs or {}))


def one_layer(build: Callable[..., Any], case: Case, width: int = 1024, tokens: int = 1024) -> dict[str, Any]:
    """What one adapted bf16 linear over `tokens` tokens keeps for backward, allocates and launches in forward."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(linear=nn.Linear(width, width, bias=False, dtype=torch.bfloat16)))
    model = build(base, case, ["linear"])
    # The input comes from elsewhere and wants a gradient, as in the middle of a model.
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    parameters = list(model.parameters())
    beyond = kept_for_backward(lambda: model(x), beyond=[x, *parameters])
    with LiveBytes() as live:
        model(x)
    with Kernels() as kernels:
        model(x)
    return {
        "kept_beyond_input_bytes": beyond,
        "input_kept": kept_for_backward(lambda: model(x), beyond=parameters) > beyond,
        "forward_peak_bytes": live.peak,
        "forward_kernels": kernels.count,
    }


# --- one step: interleaved times --------------------------------------------------------------------------------


def llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 43 // 16,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        vocab_size=2048,
    )
    return LlamaForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype))


class Runner:
    """One model with its optimizer, and what its steps took."""

    def __init__(self, model: Any, ids: Tensor, groups: Any) -> None:
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        """Forward, backward and optimizer, timed."""
        _synchronise(self.ids.device)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronise(self.ids.device)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.losses.append(loss.item())


def one_step(base: nn.Module, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of one training step of both libraries, taken in turns from equal starts."""
    ids = torch.randint(2048, (arguments.batch, arguments.length), device=arguments.device)
    left, right = ours(base, case), theirs(base, case)
    _same_start(left, right)
    pair = [
        Runner(left, ids, lorary.groups(left, lr=1e-4)),
        Runner(right, ids, [p for p in right.parameters() if p.requires_grad]),
    ]
    for turn in range(arguments.repeats + 2):
        for runner in pair if turn % 2 else reversed(pair):
            runner.step()
    a, b = pair
    gap = max(abs(x - y) / y for x, y in zip(a.losses[:3], b.losses[:3], strict=True))
    if not case.dropout and gap > (1e-4 if arguments.dtype == "float32" else 2e-2):
        raise SystemExit(f"{case.name}: the losses differ by {gap:.1e}, so the two did not do the same work")
    warm = slice(2, None)
    ratios = [x / y for x, y in zip(a.wall[warm], b.wall[warm], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cpu = statistics.median(x / y for x, y in zip(a.cpu[warm], b.cpu[warm], strict=True))
    return {
        "ours_ms": 1e3 * statistics.median(a.wall[warm]),
        "peft_ms": 1e3 * statistics.median(b.wall[warm]),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "cpu_time_ratio": cpu,
        "loss_gap": None if case.dropout else gap,
        "kept_in_bf16_bytes": kept_in_bf16(base, case, arguments),
    }


def _same_start(left: Any, right: Any) -> None:
    """Gives PEFT's adapters the values of ours (B is zero in both)."""
    twins = {name: module for name, module in right.named_modules() if hasattr(module, "lora_A")}
    sites = {m.site.name: m for m in left.modules() if isinstance(m, lorary.Adapted)}
    if len(twins) != len(sites):
        raise SystemExit(f"{len(sites)} layers adapted here, {len(twins)} by PEFT: not the same work")
    for name, module in sites.items():
        with torch.no_grad():
            twins[f"base_model.model.{name}"].lora_A["default"].weight.copy_(module.p["A"])


def kept_in_bf16(base: nn.Module, case: Case, arguments: argparse.Namespace) -> list[int]:
    """Bytes that the whole model keeps for backward with bf16 weights and float32 adapters, ours and PEFT's."""
    ids = torch.zeros(arguments.batch, arguments.length, dtype=torch.long, device=arguments.device)
    models = [build(copy.deepcopy(base).bfloat16(), case) for build in (ours, theirs)]
    return [kept_for_backward(lambda m=m: m(input_ids=ids, labels=ids).loss, beyond=m.parameters()) for m in models]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the report -------------------------------------------------------------------------------------------------


def new_table(title: str, *columns: str) -> Table:
    table = Table("method", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def layer_table(found: dict[str, Any]) -> Table:
    title = "one linear 1024 x 1024, bf16, 1024 tokens, r=16, no bias (lorary | PEFT)"
    columns = ("kept beyond its input, MiB", "input kept", "forward peak, MiB", "forward kernels")
    table = new_table(title, *columns)
    for name, (a, b) in found.items():
        table.add_row(
            name,
            f"{a['kept_beyond_input_bytes'] / MiB:.2f} | {b['kept_beyond_input_bytes'] / MiB:.2f}",
            " | ".join("yes" if x["input_kept"] else "no" for x in (a, b)),
            f"{a['forward_peak_bytes'] / MiB:.1f} | {b['forward_peak_bytes'] / MiB:.1f}",
            f"{a['forward_kernels']} | {b['forward_kernels']}",
        )
    return table


def step_table(found: dict[str, Any], arguments: argparse.Namespace) -> Table:
    title = (
        f"one step, Llama {arguments.layers} x {arguments.hidden}, {arguments.batch} x {arguments.length} tokens, "
        f"all linears r={RANK}, {arguments.dtype} on {arguments.device} ({arguments.repeats} repeats)"
    )
    columns = ("lorary, ms", "PEFT, ms", "ratio (quartiles)", "ratio of CPU times", "kept in bf16, MiB")
    table = new_table(title, *columns)
    for name, row in found.items():
        low, high = row["ratio_quartiles"]
        table.add_row(
            name,
            f"{row['ours_ms']:.0f}",
            f"{row['peft_ms']:.0f}",
            f"{row['ratio']:.3f} ({low:.3f}-{high:.3f})",
            f"{row['cpu_time_ratio']:.3f}",
            " | ".join(f"{size / MiB:.0f}" for size in row["kept_in_bf16_bytes"]),
        )
    return table


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions and settings that the figures belong to."""
    names = ("torch", "transformers", "peft", "lorary")
    gpu = torch.cuda.get_device_name() if arguments.device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "processor": gpu or platform.processor() or platform.machine(),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "time": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; more are noisier on a shared machine")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()

    layers = {case.name: [one_layer(build, case) for build in (ours, theirs)] for case in CASES}
    console.print(layer_table(layers))
    base = llama(arguments)
    steps = {case.name: one_step(base, case, arguments) for case in CASES}
    console.print(step_table(steps, arguments))

    result = {"machine": machine(arguments), "step": steps}
    result["layer"] = {name: {"ours": a, "peft": b} for name, (a, b) in layers.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {arguments.out.name}")


if __name__ == "__main__":
    main()
