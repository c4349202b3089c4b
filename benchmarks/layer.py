"""What one adapted linear layer keeps, allocates and launches: lorary beside PEFT, exact counts.

    python benchmarks/layer.py

One layer 1024 x 1024 in bf16 over 1024 tokens, without a bias; and one token in decoding.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cases import CASES, MiB, machine, new_table
from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward


class Kernels(TorchDispatchMode):
    """Counts the operators that compute something; those that only look at or reserve memory are free."""

    FREE = frozenset({"_unsafe_view", "detach", "alias", "empty", "empty_like", "_local_scalar_dense"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in self.FREE)
        return func(*args, **(kwargs or {}))


def largest_kept(run: Callable[[], object], known: list[Tensor]) -> int:
    """Numbers in the largest tensor that is kept for backward and is none of those known."""
    addresses = {t.untyped_storage()._cdata for t in known}
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in addresses:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return max(sizes)


def measure(build: Callable[..., Any], width: int = 1024, tokens: int = 1024) -> dict[str, Any] | None:
    """The counts of one layer in training, and of one token in decoding."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(linear=nn.Linear(width, width, bias=False, dtype=torch.bfloat16)))
    model = build(base.requires_grad_(False), ["linear"])
    if model is None:
        return None
    # The input comes from elsewhere and wants a gradient, as in the middle of a model.
    x = torch.randn(tokens, width).bfloat16().requires_grad_()
    known = [*model.parameters(), *model.buffers()]
    beyond = kept_for_backward(lambda: model(x), beyond=[x, *known])
    # at half as many tokens no activation has as many numbers as the weight
    short = torch.randn(tokens // 2, width).bfloat16().requires_grad_()
    largest = largest_kept(lambda: model(short), [short, *known])
    with LiveBytes() as live:
        model(x)
    with Kernels() as kernels:
        model(x)
    model.eval()
    token = x.detach()[:1]
    with torch.no_grad():
        model(token)
        with FlopCounterMode(display=False) as flops:
            model(token)
    return {
        "kept_beyond_input_bytes": beyond,
        "input_kept": kept_for_backward(lambda: model(x), beyond=known) > beyond,
        "keeps_a_weight_sized_tensor": largest >= width * width,
        "forward_peak_bytes": live.peak,
        "forward_kernels": kernels.count,
        "decoding_flops": flops.get_total_flops(),
    }


def table(found: dict[str, Any]) -> Table:
    """lorary's figures, and PEFT's where it has the method."""
    columns = (
        "kept beyond its input, MiB",
        "input kept",
        "a weight-sized one",
        "peak, MiB",
        "kernels",
        "decoding, kflop",
    )
    made = new_table("one linear 1024 x 1024, bf16, 1024 tokens, r=16, no bias (lorary | PEFT)", *columns)
    yes = {True: "yes", False: "no"}
    rows: tuple[Callable[[Any], str], ...] = (
        lambda f: f"{f['kept_beyond_input_bytes'] / MiB:.2f}",
        lambda f: yes[f["input_kept"]],
        lambda f: yes[f["keeps_a_weight_sized_tensor"]],
        lambda f: f"{f['forward_peak_bytes'] / MiB:.1f}",
        lambda f: str(f["forward_kernels"]),
        lambda f: f"{f['decoding_flops'] / 1e3:.0f}",
    )
    for name, pair in found.items():
        made.add_row(name, *(" | ".join("-" if f is None else row(f) for f in pair) for row in rows))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {case.name: [measure(case.ours), measure(case.theirs)] for case in CASES}
    Console().print(table(found))
    result = {"machine": machine(arguments), "layer": {name: {"ours": a, "peft": b} for name, (a, b) in found.items()}}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
