"""The memory planner beside a simulated step of all blocks, the allocator's own account, and published peaks.

    python benchmarks/memory.py                    # about two minutes
    python benchmarks/memory.py --only published   # at once
    python benchmarks/memory.py --device cuda      # measured by PyTorch's CUDA allocator

Measured is the fullest moment of a real second optimizer step, beyond what stays from step to step, and counted by
the allocator itself: every allocation and release that PyTorch's profiler reports on the CPU, `max_memory_allocated`
on CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import lorary
from cases import machine
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.model.labelled_head import LabelledHead
from published import CASES

_LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6, "vocab_size": 4000}
_LLAMA |= {"hidden_size": 256, "intermediate_size": 704, "head_dim": 32, "pad_token_id": 0}
_GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 8, "vocab_size": 4000, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Run:
    """One configuration: the presets, their options, and the micro-batch."""

    presets: str
    options: dict[str, Any] = field(default_factory=lambda: {"r": 8})
    family: str = "llama"
    batch: int = 2
    length: int = 128
    dtype: str = "float32"
    checkpointing: bool = False
    padding: bool = False
    autocast: bool = False
    targets: str = "all-linear"
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        words = [self.family, self.presets.replace(",", "+"), f"{self.batch} x {self.length}", self.dtype]
        words += [f"dropout {self.options['dropout']}"] if "dropout" in self.options else []
        flags = ("checkpointing", "padding", "autocast")
        words += [flag for flag in flags if getattr(self, flag)]
        words += [self.targets] if self.targets != "all-linear" else []
        return ", ".join(words + ([self.attention] if self.attention != "sdpa" else []))


DROPPED = {"r": 8, "dropout": 0.1}
RUNS = [
    Run("lora"),
    Run("lora", batch=4, length=256),
    Run("lora", batch=1, length=512, dtype="bfloat16"),
    Run("lora", checkpointing=True, batch=4, length=256),
    Run("lora", DROPPED, dtype="bfloat16"),
    Run("lora", DROPPED, checkpointing=True, length=256),
    Run("lora", padding=True, batch=4),
    Run("lora", targets="attention-qv", length=256),
    Run("lora", attention="eager", length=256),
    Run("lora", autocast=True, length=256),
    Run("lora", autocast=True, checkpointing=True, length=256),
    Run("lora-fa", DROPPED, length=256),
    Run("dora", length=256),
    Run("dora", DROPPED, checkpointing=True),
    Run("vera", {"r": 64}, length=256),
    Run("adalora", DROPPED),
    Run("qlora", length=256),
    Run("qlora,dora", checkpointing=True, length=256),
    Run("full", {}, length=256),
    Run("lora", family="gpt2", length=256),
    Run("lora", family="gpt2", checkpointing=True, batch=4),
    Run("lora", family="qwen3", length=256),
    Run("lora", family="gemma3_text", dtype="bfloat16", checkpointing=True, length=256),
]


def build(run: Run) -> Any:
    """The model of a run, with random weights."""
    settings = _GPT2 if run.family == "gpt2" else _LLAMA
    config = AutoConfig.for_model(run.family, **settings)
    config._attn_implementation = run.attention
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, run.dtype))


def measured(run: Run, model: Any, plan: lorary.Plan, device: torch.device) -> int:
    """Bytes at the fullest moment of a real second step, beyond what stays."""
    lorary.attach(model.to(device).train(), plan)
    LabelledHead(model).install()
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-4))
    ids = torch.randint(1, 4000, (run.batch, run.length), device=device)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    inputs = {"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if run.padding else {})

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=run.autocast):
            loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most


def compared(run: Run, device: torch.device) -> dict[str, Any]:
    """The whole peak of a run three times: extrapolated, simulated with all blocks, measured."""
    model = build(run)
    plan = lorary.plan(model, lorary.method(*run.presets.split(","), **run.options), run.targets)
    dtype = getattr(torch, run.dtype)
    work = Workload(run.batch, run.length, dtype, run.autocast, run.padding, checkpointing=run.checkpointing)
    found = predict(model, plan, work)
    whole = predict(model, plan, work, whole=True).total
    real = found.fixed + measured(run, model, plan, device)
    return {"run": run.name, "predicted": found.total, "all_blocks": whole, "measured": real} | {
        "moving": found.moving / (real - found.fixed) - 1,
        "error": found.total / real - 1,
        "off_all_blocks": found.total / whole - 1,
    }


def published() -> list[dict[str, Any]]:
    """Every published peak, and the prediction by its library's convention."""
    return [
        {"case": c.name, "published": c.bytes, "predicted": c.predicted, "error": c.error, "why": c.why} for c in CASES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", choices=["measured", "published"], help="default: both")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine(options)}
    console = Console(width=140)
    if options.only != "published":
        found["measured"] = [compared(run, options.device) for run in RUNS]
        table = Table("run", "measured, MiB", "predicted", "of what moves", "over all blocks")
        for row in found["measured"]:
            errors = [f"{row[key]:+.1%}" for key in ("error", "moving", "off_all_blocks")]
            table.add_row(row["run"], f"{row['measured'] / 2**20:.1f}", *errors)
        console.print(table, _summary([row["moving"] for row in found["measured"]]))
    if options.only != "measured":
        found["published"] = published()
        table = Table("published", "GB", "predicted", "error")
        for row in found["published"]:
            size = [row["published"] / 1e9, row["predicted"] / 1e9]
            if size[0] < 0.1:  # a slope
                size = [x * 1000 for x in size]
            cells = [f"{x:.2f}" if row["published"] > 1e8 else f"{x:.3f} MB a token" for x in size]
            table.add_row(row["case"] + (" *" if row["why"] else ""), *cells, f"{row['error']:+.1%}")
        console.print(table, _summary([row["error"] for row in found["published"] if not row["why"]]))
        for row in found["published"]:
            if row["why"]:
                console.print(f"* {row['case']}: {row['why']}")
    if options.only:
        return  # the file holds both
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def _summary(errors: list[float]) -> str:
    sizes = sorted(abs(error) for error in errors)
    return f"{len(sizes)} cases: median {statistics.median(sizes):.1%}, largest {sizes[-1]:.1%}"


if __name__ == "__main__":
    main()
