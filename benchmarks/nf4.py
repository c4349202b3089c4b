"""4-bit weights on the CPU beside bitsandbytes: unpacking, the forward pass of one token, and a training step.

    python benchmarks/nf4.py                  # all, one thread, a training step of 1,024 tokens
    python benchmarks/nf4.py --only unpack;token

Everything that is compared takes turns in one process; what is reported is the median over the repeats of the ratio of
times within a repeat, with its quartiles. bitsandbytes makes a new tensor for every dequantised weight (on the CPU its
operator takes no buffer); beside that stands its kernel alone, called with a buffer that is used again.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lorary
from cases import ALL_LINEAR, ALPHA, RANK, llama, machine, parser, ratio
from lorary.kernels import nf4
from lorary.layers.adapted import adapted_layers
from step import Runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Found = dict[str, dict[str, Any]]
# row -> (which time, over which other, the most that it may be): what the issue of the 4-bit base asks for
GOALS: dict[str, tuple[str, str, float]] = {
    **{f"unpack 2048, {name}": ("lorary", "bitsandbytes", 1.0) for name in DTYPES},
    **{f"unpack 4096, {name}": ("lorary", "bitsandbytes", 1 / 3) for name in DTYPES},
    **{f"token {side}, {name}": ("lorary", "bitsandbytes", 1 / 5) for side in (2048, 4096) for name in DTYPES},
    "step, float32": ("lorary, NF4", "lorary, dense", 1.25),
    "step, float32 ": ("lorary, NF4", "bitsandbytes + PEFT", 1.0),
    "step, bfloat16": ("lorary, NF4", "bitsandbytes + PEFT", 1.0),
}


def in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """name -> seconds of each repeat, the order turning, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats + 2):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: taken[2:] for name, taken in times.items()}


def their_linear(W: Tensor) -> nn.Module:
    """A layer of bitsandbytes with this weight."""
    layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu")


def unpacking(arguments: argparse.Namespace) -> Found:
    """Ours into a buffer, theirs, their kernel into a buffer, and a copy of as many bytes."""
    found = {}
    for side in (2048, 4096):
        for name, dtype in DTYPES.items():
            W = torch.randn(side, side, dtype=dtype)
            state = their_linear(W).weight
            codes, quantised = state.data, state.quant_state
            nested, offset = quantised.state2.absmax, quantised.offset
            packed = nf4.QuantizedTensor(codes, quantised.absmax, nested, offset, (side, side), 64)
            ours, buffer = torch.empty_like(W), torch.empty_like(W)
            runs = {
                "lorary": lambda p=packed, d=dtype, o=ours: nf4.dequantize(p, d, o),
                "bitsandbytes": lambda c=codes, q=quantised: bnb.functional.dequantize_4bit(c, q),
                "its kernel alone": lambda c=codes, q=quantised, o=buffer: _their_kernel(c, q, o),
                "copy": lambda a=W, o=buffer: o.copy_(a),
            }
            runs["its kernel alone"]()
            if not torch.equal(runs["lorary"](), runs["bitsandbytes"]()) or not torch.equal(ours, buffer):
                raise SystemExit("the two do not unpack the same numbers")
            found[f"unpack {side}, {name}"] = in_turns(runs, arguments.repeats)
    return found


def _their_kernel(codes: Tensor, state: Any, out: Tensor) -> None:
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    kernel = (
        lib.cdequantize_blockwise_cpu_nf4_fp32 if out.dtype == torch.float32 else lib.cdequantize_blockwise_cpu_nf4_bf16
    )
    sizes = (ctypes.c_longlong(number) for number in (64, *out.shape))
    kernel(*(bnb.functional.get_ptr(tensor) for tensor in (codes, absmax, out)), *sizes)


def token(arguments: argparse.Namespace) -> Found:
    """The forward pass of one token through one layer."""
    found = {}
    for side in (2048, 4096):
        for name, dtype in DTYPES.items():
            W, x = torch.randn(side, side, dtype=dtype), torch.randn(1, side, dtype=dtype)
            theirs, packed = their_linear(W).eval(), nf4.quantize(W)
            with torch.inference_mode():
                runs = {
                    "lorary": lambda x=x, p=packed: nf4.linear(x, p),
                    "bitsandbytes": lambda x=x, layer=theirs: layer(x),
                    "dense": lambda x=x, W=W: nn.functional.linear(x, W),
                }
                a, b = runs["lorary"](), runs["bitsandbytes"]()
                if (a - b).abs().max() > 0.02 * b.abs().max():
                    raise SystemExit("the two do not compute the same")
                found[f"token {side}, {name}"] = in_turns(runs, arguments.repeats)
    return found


def step(arguments: argparse.Namespace) -> Found:
    """A training step of LoRA on all linears: on a dense base, on ours in NF4, and bitsandbytes' with PEFT's."""
    found = {}
    for name in DTYPES:
        arguments.dtype = name
        base, ids = llama(arguments), torch.randint(2048, (arguments.batch, arguments.length))
        runners = {
            "lorary, dense": _ours(base, ids, "lora"),
            "lorary, NF4": _ours(base, ids, "lora", "qlora"),
            "bitsandbytes + PEFT": _theirs(base, ids),
        }
        _same_start(runners["lorary, NF4"].model, runners["bitsandbytes + PEFT"].model)
        runs = {key: runner.step for key, runner in runners.items()}
        found[f"step, {name}"] = in_turns(runs, arguments.repeats)
        ours, theirs = (runners[key].losses[-1] for key in ("lorary, NF4", "bitsandbytes + PEFT"))
        if not math.isfinite(ours) or abs(ours - theirs) > 0.02 * theirs:
            raise SystemExit(f"the losses are {ours} and {theirs}, so the two did not do the same work")
    return found


def _ours(base: nn.Module, ids: Tensor, *names: str) -> Runner:
    model = copy.deepcopy(base)
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=RANK, alpha=ALPHA)))
    return Runner(model.train(), ids, lorary.param_groups(model, lr=1e-4))


def _theirs(base: nn.Module, ids: Tensor) -> Runner:
    model = copy.deepcopy(base)
    for block in model.model.layers:  # type: ignore[union-attr]
        for path in [path for path, layer in block.named_modules() if isinstance(layer, nn.Linear)]:
            parent, _, leaf = path.rpartition(".")
            setattr(block.get_submodule(parent), leaf, their_linear(block.get_submodule(path).weight.data))
    wrapped: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR))
    return Runner(wrapped.train(), ids, [p for p in wrapped.parameters() if p.requires_grad])


def _same_start(ours: Any, theirs: Any) -> None:
    parameters = dict(theirs.named_parameters())
    for name, layer in adapted_layers(ours).items():
        with torch.no_grad():
            parameters[f"base_model.model.{name}.lora_A.default.weight"].copy_(layer.params["A"])


def rows(found: Found) -> list[dict[str, Any]]:
    """What is compared, in which ratio, against which goal."""
    made = []
    for key, (ours, other, most) in GOALS.items():
        if key.strip() in found:
            times = found[key.strip()]
            low, middle, high = ratio(times[ours], times[other])
            made.append({"what": key.strip(), "of": ours, "over": other, "ratio": [low, middle, high], "at most": most})
    return made


def table(found: Found) -> Table:
    """Ratios and times."""
    made = Table(title=f"4-bit weights on the CPU ({nf4.backend()})")
    for column in ("what", "of", "over", "ratio", "goal", "ms"):
        made.add_column(column)
    for row in rows(found):
        low, middle, high = row["ratio"]
        times = ", ".join(f"{key} {1e3 * statistics.median(t):.2f}" for key, t in found[row["what"]].items())
        goal = f"{'met' if middle <= row['at most'] else 'MISSED'}: at most {row['at most']:.3f}"
        made.add_row(row["what"], row["of"], row["over"], f"{middle:.3f} ({low:.3f}-{high:.3f})", goal, times)
    return made


PARTS = {"unpack": unpacking, "token": token, "step": step}


def main() -> None:
    made = parser(__doc__, "parts (unpack, token, step)", "nf4.json")
    made.set_defaults(length=1024, layers=2)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    found: Found = {}
    for name, part in PARTS.items():
        if not only or name in only:
            found |= part(arguments)
    Console(width=200).print(table(found))
    medians = {what: {key: 1e3 * statistics.median(t) for key, t in times.items()} for what, times in found.items()}
    about = machine(arguments)
    about["versions"]["bitsandbytes"] = version("bitsandbytes")
    about |= {"backend": nf4.backend(), "bitsandbytes has a product of its own": bnb.functional.has_avx512bf16()}
    out = arguments.out or Path(__file__).parent / "results" / "nf4.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": about, "ms": medians, "ratios": rows(found)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
