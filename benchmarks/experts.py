"""One training step of a mixture of experts: LoRA on fused experts beside the frozen base, PEFT, and unfused experts.

    python benchmarks/experts.py

A model in the shape of Qwen3-MoE (64 experts, 8 of them for each token) with r = 16 on every expert matrix. The step is
forward and backward, with a gradient for the embedded tokens in every case, so that the base's backward is there too.
"base" is that model frozen, in fp32. "NF4" has its weights in 4 bits. "unfused" has the same weights as one nn.Linear
for each projection of each expert, in a loop over the experts, with lorary's LoRA on each. The cases take turns; the
figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorary
from cases import MiB, machine, new_table
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.model.scan import numbers_and_bytes

EXPERTS, TOP, RANK = 64, 8, 16


class Unfused(nn.Module):
    """Experts with a linear layer for each projection, in a loop over those that got tokens."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.act_fn = fused.act_fn
        for name, weights in (
            ("gate_proj", fused.gate_up_proj.chunk(2, 1)[0]),
            ("up_proj", fused.gate_up_proj.chunk(2, 1)[1]),
            ("down_proj", fused.down_proj),
        ):
            setattr(self, name, nn.ModuleList(linear(W) for W in weights))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == e)
            x = hidden_states[token]
            y = self.down_proj[e](self.act_fn(self.gate_proj[e](x)) * self.up_proj[e](x))
            total = total.index_add(0, token, y * top_k_weights[token, place, None])
        return total


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight = nn.Parameter(W.detach().clone())
    return layer


def base(hidden: int) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config).requires_grad_(False).train()


def by_lorary(model: Any, targets: list[str], *presets: str) -> Any:
    method = lorary.method("lora", *presets, r=RANK, alpha=RANK)
    return lorary.attach(model, lorary.plan(model, method, targets=targets))


def by_peft(model: Any) -> Any:
    import peft

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=names)
    return peft.get_peft_model(model, config)


def unfused(model: Any) -> Any:
    for block in model.model.layers:
        block.mlp.experts = Unfused(block.mlp.experts)
    return by_lorary(model.requires_grad_(False), ["*.gate_proj.*", "*.up_proj.*", "*.down_proj.*"])


CASES: dict[str, Callable[[Any], Any]] = {
    "base": lambda model: model,
    "lorary": lambda model: by_lorary(model, ["experts.gate_up_proj", "experts.down_proj"]),
    "lorary, NF4": lambda model: by_lorary(model, ["experts.gate_up_proj", "experts.down_proj"], "qlora"),
    "PEFT": by_peft,
    "unfused": unfused,
}


def logits(model: Any, embedded: Tensor) -> Tensor:
    found: Tensor = model(inputs_embeds=embedded, use_cache=False).logits
    return found


def step(model: Any, embedded: Tensor) -> None:
    logits(model, embedded).square().mean().backward()
    model.zero_grad()
    embedded.grad = None


def measure(hidden: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    embedded = torch.randn(1, tokens, hidden, requires_grad=True)
    models = {name: build(base(hidden)) for name, build in CASES.items()}
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for i in range(rounds + 1):  # the first one warms up
        for name, model in models.items():
            start = time.perf_counter()
            step(model, embedded)
            if i:
                times[name].append(time.perf_counter() - start)
    found = {}
    for name, model in models.items():
        known = [embedded, *model.parameters(), *model.buffers()]
        kept = kept_for_backward(partial(logits, model, embedded), beyond=known)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[name] = {"seconds": statistics.median(times[name]), "kept_bytes": kept, "trained": trained}
        found[name]["weights_bytes"] = numbers_and_bytes(model.modules(), frozen(model))[1]
    return found


def frozen(model: Any) -> list[Tensor]:
    """The base's parameters."""
    return [p for p in model.parameters() if not p.requires_grad]


def table(found: dict[str, dict[str, float]], hidden: int, tokens: int) -> Table:
    made = new_table(
        f"{EXPERTS} experts, top {TOP}, hidden {hidden}, {tokens} tokens, r={RANK}, fp32, 1 thread",
        *("step, ms", "over the base", "kept for backward, MiB", "weights, MiB", "trained"),
    )
    for name, figures in found.items():
        ratio = figures["seconds"] / found["base"]["seconds"]
        cells = f"{figures['seconds'] * 1e3:.0f}", f"{ratio:.2f}", f"{figures['kept_bytes'] / MiB:.0f}"
        made.add_row(name, *cells, f"{figures['weights_bytes'] / MiB:.0f}", f"{figures['trained']:,}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "experts.json")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for tokens in arguments.tokens:
        cases[str(tokens)] = measure(arguments.hidden, tokens, arguments.rounds)
        Console().print(table(cases[str(tokens)], arguments.hidden, tokens))
    result = machine(arguments) | {"load": os.getloadavg()[0], "tokens": cases}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
