"""The measured methods, as lorary and as PEFT configure them, and the model for the measurements."""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, GloraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorary

warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it

RANK, ALPHA, VERA_RANK = 16, 32, 256
MiB = 2**20
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One method, configured for both libraries.

    Args:
        name: of the method.
        method: what lorary makes of it.
        peft: PEFT's configuration for the given targets, or None where PEFT has no such method.
        start: role -> the suffix of PEFT's parameter that gets the value of ours, so that both start equal.
    """

    name: str
    method: lorary.Method
    peft: Callable[[Any], PeftConfig] | None = None
    start: dict[str, str] = field(default_factory=dict)

    @property
    def random(self) -> bool:
        """Whether a step draws random numbers, so that losses cannot agree."""
        return self.method.dropout > 0

    def ours(self, base: nn.Module, targets: Any = "all-linear") -> Any:
        """A copy of the model with lorary's adapters."""
        model = copy.deepcopy(base)
        return lorary.attach(model, lorary.plan(model, self.method, targets)).train()

    def theirs(self, base: nn.Module, targets: Any = "all-linear") -> Any:
        """A copy of the model with PEFT's adapters at its defaults; LoRA-FA freezes A as its helper does."""
        if self.peft is None:
            return None
        names = ALL_LINEAR if targets == "all-linear" else targets
        model = get_peft_model(copy.deepcopy(base), self.peft(names))
        for name, parameter in model.named_parameters():
            if "A" in self.method.frozen and ".lora_A." in name:
                parameter.requires_grad_(False)
        return model.train()


def _lora(*presets: str, r: int = RANK, dropout: float = 0.0, **words: Any) -> lorary.Method:
    return lorary.method(*presets, r=r, alpha=ALPHA, dropout=dropout, **words)


def _peft(**words: Any) -> Callable[[Any], PeftConfig]:
    return lambda targets: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **words)


def _adalora(targets: Any) -> PeftConfig:
    return AdaLoraConfig(init_r=12, target_r=8, lora_alpha=ALPHA, total_step=1000, target_modules=targets)


_PAIR = {"A": "lora_A.default.weight"}
CASES = [
    Case("LoRA", _lora("lora"), _peft(), _PAIR),
    Case("LoRA, dropout 0.1", _lora("lora", dropout=0.1), _peft(lora_dropout=0.1), _PAIR),
    Case("rsLoRA", _lora("rslora"), _peft(use_rslora=True), _PAIR),
    Case("LoRA-FA", _lora("lora-fa"), _peft(), _PAIR),
    Case("LoRA-FA, dropout 0.1", _lora("lora-fa", dropout=0.1), _peft(lora_dropout=0.1), _PAIR),
    Case("DoRA", _lora("dora"), _peft(use_dora=True), _PAIR),
    Case("DoRA, dropout 0.1", _lora("dora", dropout=0.1), _peft(use_dora=True, lora_dropout=0.1), _PAIR),
    Case("PiSSA", _lora("pissa", niter=4), _peft(init_lora_weights="pissa_niter_4")),
    Case("OLoRA", _lora("olora"), _peft(init_lora_weights="olora")),
    Case(
        "VeRA, r=256",
        lorary.method("vera", r=VERA_RANK),
        lambda targets: VeraConfig(r=VERA_RANK, target_modules=targets),
    ),
    Case(
        "AdaLoRA, r=12",
        lorary.method("adalora", r=12, alpha=ALPHA),
        _adalora,
        {"Q": "lora_A.default", "P": "lora_B.default"},
    ),
    Case("O-LoRA", _lora("o-lora"), _peft(), _PAIR),
    Case("Delta-LoRA", _lora("delta-lora"), _peft(), _PAIR),
    Case("MELoRA, n=2, r=8", _lora("melora", r=RANK // 2, n=2)),
    Case("MultiLoRA, n=3", _lora("multilora", n=3)),
    Case("DoRA + rsLoRA + PiSSA + LoRA+", _lora("dora", "rslora", "pissa", "lora+", niter=4)),
]
if "glora" in lorary.presets():
    CASES.append(
        Case("GLoRA, r=4", lorary.method("glora", r=4), lambda targets: GloraConfig(r=4, target_modules=targets))
    )


def llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of the asked size, frozen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 43 // 16,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        vocab_size=2048,
    )
    model = LlamaForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype))
    return model.requires_grad_(False)


def parser(doc: str | None, of: str, out: str) -> argparse.ArgumentParser:
    """The options of a script that times training steps.

    Args:
        doc: of the script.
        of: what `--only` names.
        out: the file in `results/` that it writes.
    """
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    made.add_argument("--threads", type=int, default=1, help="of the CPU; more are noisier on a shared machine")
    made.add_argument("--repeats", type=int, default=12)
    made.add_argument("--hidden", type=int, default=1024)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--length", type=int, default=512, help="tokens")
    made.add_argument("--only", default="", help=f"names of {of}, separated by semicolons")
    made.add_argument("--out", type=Path, help=f"default: results/{out}")
    return made


def ratio(a: list[float], b: list[float]) -> list[float]:
    """The lower quartile, median and upper quartile of a / b within a repeat."""
    return statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Versions and settings that the figures belong to; places on this machine are not among them."""
    names = ("torch", "transformers", "peft", "lorary")
    device = getattr(arguments, "device", torch.device("cpu"))
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "processor": gpu or platform.processor() or platform.machine(),
        "settings": {key: str(value) for key, value in vars(arguments).items() if os.sep not in str(value)},
        "time": time.strftime("%Y-%m-%d"),
    }


def new_table(title: str, *columns: str) -> Table:
    """A table of methods."""
    table = Table("method", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table
