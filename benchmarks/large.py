"""One optimizer step of QLoRA on the shapes of LLaMA-7B and LLaMA-65B, beside bitsandbytes + PEFT in the same run.

    python benchmarks/large.py                    # on a GPU: 7B and 65B, bfloat16, 1 x 512 tokens
    python benchmarks/large.py --sizes 7B
    python benchmarks/large.py --sizes small      # wherever it runs: on the CPU a check of this script

The weights are random codes in NF4 with double quantisation, made where they are used: no checkpoint is read, and no
dense model is ever there. LoRA of rank 64 on all linear layers, every block computed again in the backward pass, AdamW
with moments in host memory. Where both models fit on the device they take turns; else one follows the other. The
highest point of the memory is PyTorch's own figure on a GPU, counted tensor by tensor on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorary
from cases import ALL_LINEAR, machine, ratio
from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.kernels.nf4 import QuantizedTensor
from lorary.layers.bitsandbytes_state import write_state
from lorary.model.quantize import replace_layer

# hidden, intermediate, layers, heads, vocabulary; and the most gigabytes that the issue of the 4-bit base allows
SIZES = {
    "small": (256, 688, 2, 4, 512, None),
    "7B": (4096, 11008, 32, 32, 32000, 6),
    "65B": (8192, 22016, 80, 64, 32000, 48),
}
RANK, ALPHA, BLOCK = 64, 16, 64
Step = Callable[[], None]


def bare(size: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The architecture, on the meta device."""
    hidden, intermediate, layers, heads, vocabulary, _ = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
    )
    config.use_cache = False
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


def codes(out: int, inp: int, device: torch.device) -> QuantizedTensor:
    """Random codes: magnitudes of some 0.06, as weights of a standard deviation of 0.02 have."""
    numbers, blocks = out * inp, out * inp // BLOCK

    def draw(n: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), dtype=torch.uint8, device=device)

    return QuantizedTensor(
        draw(numbers // 2, 0, 256)[:, None],
        draw(blocks, 96, 160),
        torch.full((-(-blocks // 256),), 0.01, device=device),
        torch.tensor(0.06, device=device),
        (out, inp),
        BLOCK,
    )


def filled(model: Any, device: torch.device) -> Any:
    """Random values for all unquantised tensors of a meta-device model, on the device."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    rotary = model.model.rotary_emb
    with device:
        model.model.rotary_emb = type(rotary)(model.config)
    return model


def ours(size: str, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = bare(size, dtype)
    plan = lorary.plan(model, lorary.method("qlora", r=RANK, alpha=ALPHA))
    for name in plan.quantized:
        layer = model.get_submodule(name)
        made = lorary.NF4().quantize(
            nn.Linear(layer.in_features, layer.out_features, False, device="meta", dtype=dtype)
        )
        fresh = codes(layer.out_features, layer.in_features, device)
        made.weight = nn.Parameter(fresh.codes, requires_grad=False)
        for key in ("absmax", "nested_absmax", "nested_offset"):
            setattr(made, key, getattr(fresh, key))
        replace_layer(model, name, made)
    filled(model, device)
    return lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=RANK, alpha=ALPHA)))


def theirs(size: str, dtype: torch.dtype, device: torch.device) -> Any:
    model: Any = bare(size, dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            replace_layer(model, name, their_layer(layer.out_features, layer.in_features, dtype, device))
    filled(model, device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR)
    return get_peft_model(model, config)


def their_layer(out: int, inp: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """bitsandbytes' own layer, of random codes made in the same way."""
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(inp, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    state = write_state(codes(out, inp, device), dtype)
    made.weight = bnb.nn.Params4bit.from_prequantized(
        codes(out, inp, device).codes, {f"weight.{key}": value for key, value in state.items()}, device=device
    )
    made.quant_state = made.weight.quant_state
    return made


def step_of(model: Any, ids: Tensor) -> Step:
    """A training step with everything that a run has: checkpointing, gradients, AdamW with paged moments."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if ids.is_cuda:
        optimizer: Any = bnb.optim.PagedAdamW32bit(trained, lr=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@contextmanager
def highest(device: torch.device) -> Iterator[list[float]]:
    """[bytes] that tensors take at their highest point within, what was there before included on a GPU alone."""
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    with LiveBytes() as live:
        yield found
    found[0] = live.peak


def seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measured(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Highest points and times of both, and what lorary predicts of its own."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    vocabulary = SIZES[size][4]
    ids = torch.randint(vocabulary, (1, arguments.length), device=device)
    found: dict[str, Any] = {"size": size, "tokens": arguments.length, "at most, GB": SIZES[size][5]}
    model = bare(size, dtype)
    plan = lorary.plan(model, lorary.method("qlora", r=RANK, alpha=ALPHA))
    found["trains"] = plan.trainable
    found["predicted, GB"] = predict(model, plan, Workload(1, arguments.length, checkpointing=True)).total / 1e9
    times: dict[str, list[float]] = {}
    for name, make in (("lorary", ours), ("bitsandbytes + PEFT", theirs)):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with highest(device) as top:
            step = step_of(make(size, dtype, device), ids)
            seconds(step, device)
        found[f"highest, GB: {name}"] = top[0] / 1e9
        times[name] = [seconds(step, device) for _ in range(arguments.repeats)]
        del step
    low, middle, high = ratio(times["bitsandbytes + PEFT"], times["lorary"])
    found["seconds"] = {name: statistics.median(each) for name, each in times.items()}
    found["times as fast"] = [low, middle, high]
    return found


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    gpu = torch.cuda.is_available()
    made.add_argument("--device", type=torch.device, default=torch.device("cuda" if gpu else "cpu"))
    made.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if gpu else "float32")
    made.add_argument("--sizes", default="7B,65B" if gpu else "small", help=f"of {', '.join(SIZES)}")
    made.add_argument("--length", type=int, default=512 if gpu else 64, help="tokens")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--threads", type=int, default=1, help="of the CPU")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large.json")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measured(size.strip(), arguments) for size in arguments.sizes.split(",")]
    table = Table(title=f"one step of QLoRA, r = {RANK}, on {arguments.device}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=220).print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "steps": rows}, indent=2) + "\n")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "{1:.2f} ({0:.2f}-{2:.2f})".format(*value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value or "")


if __name__ == "__main__":
    main()
