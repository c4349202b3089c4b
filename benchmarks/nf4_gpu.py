"""4-bit weights on a GPU: share of the memory's bandwidth kernels reach; bitsandbytes and dense weights beside.

    python benchmarks/nf4_gpu.py            # the layers of LLaMA-7B and 65B, in bfloat16
    python benchmarks/nf4_gpu.py --small    # small layers, wherever it runs: on the CPU a check of this script

Unpacking a weight and multiplying it with a few rows take as long as their bytes take to come and go, if the kernels
are good: the quantised weight once, the input and the output. Those bytes over the time are the bandwidth reached; its
share is of what a copy of a large tensor reaches in the same run, and of what the memory is built for, where the
driver says it. Every call of a kernel meets another copy of its weight, so that none comes from the GPU's cache; on a
GPU the calls are replayed as one graph, so that the time to launch them does not count. Both libraries read the very
same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as BF
from bitsandbytes import matmul_4bit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from cases import MiB, machine
from lorary.kernels import nf4

# [out, inp] of the attention's and the MLP's layers
SHAPES = {
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "65B": [(8192, 8192), (22016, 8192), (8192, 22016)],
}
SMALL = {"small": [(256, 512), (192, 320)]}
COLD = 256 * MiB  # more than any GPU's cache
ROWS = (1, 8)
Call = Callable[[int], object]  # what is timed, given the number of the call


def seconds(call: Call, calls: int, repeats: int, device: torch.device) -> float:
    """Of one call: the median over the repeats of so many, each with a number of its own."""
    for number in range(calls):
        call(number)
    if device.type != "cuda":
        return statistics.median(_on_cpu(call, calls) for _ in range(repeats)) / calls
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            call(number)
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:]) / calls


def _on_cpu(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for number in range(calls):
        call(number)
    return time.perf_counter() - start


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def of_copy(size: int, repeats: int, device: torch.device) -> float:
    """Bytes per second that a copy of `size` bytes reads and writes."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda _: b.copy_(a), 4, repeats, device)


def of_memory(device: torch.device) -> float | None:
    """Bytes per second that the memory is built for, where the driver says it: two transfers a clock."""
    if device.type != "cuda":
        return None
    known = torch.cuda.get_device_properties(device)
    clock, width = (getattr(known, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * clock * width / 8 if clock and width else None


class Layer:
    """Copies of one layer's weight: quantised, for both libraries, and dense.

    Args:
        shape: (out, inp).
        cold: the least total bytes of the quantised copies.
        device: where it is.
        dtype: of what goes in and out.
    """

    def __init__(self, shape: tuple[int, int], cold: int, device: torch.device, dtype: torch.dtype) -> None:
        W = torch.randn(shape, device=device, dtype=dtype) * 0.02
        codes, state = BF.quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")
        parts = (codes, state.absmax, state.state2.absmax, state.offset)
        self.bytes, self.shape, self.dtype = bytes_of(*parts), shape, dtype
        self.state, self.W = state, W
        self.many = max(2, math.ceil(cold / self.bytes))
        self.packed = [
            nf4.Packed(*(part.clone() for part in parts), shape=shape, block=64)  # type: ignore[misc]
            for _ in range(self.many)
        ]
        self.outs = [torch.empty_like(W) for _ in range(max(2, math.ceil(cold / bytes_of(W))))]
        self.dense = [W.clone() for _ in self.outs]

    def calls(self) -> dict[str, tuple[int, dict[str, Call]]]:
        """What is measured -> the bytes that it has to move, and who does it."""
        outs, packed, dense, many = self.outs, self.packed, self.dense, self.many

        def theirs(number: int) -> Tensor:
            out = outs[number % len(outs)] if self.W.is_cuda else None  # its operator for the CPU takes none
            return BF.dequantize_4bit(packed[number % many].codes, self.state, out=out)

        found: dict[str, tuple[int, dict[str, Call]]] = {
            "unpack": (
                self.bytes + bytes_of(self.W),
                {
                    "lorary": lambda n: nf4.dequantize(packed[n % many], self.dtype, outs[n % len(outs)]),
                    "bitsandbytes": theirs,
                },
            )
        }
        for rows in ROWS:
            x = torch.randn(rows, self.shape[1], device=self.W.device, dtype=self.dtype)
            moved = self.bytes + rows * sum(self.shape) * x.element_size()
            found[f"{rows} row{'s' if rows > 1 else ''}"] = (
                moved,
                {
                    "lorary": lambda n, x=x: nf4.linear(x, packed[n % many]),  # type: ignore[misc]
                    "bitsandbytes": lambda n, x=x: matmul_4bit(x, packed[n % many].codes.t(), self.state),  # type: ignore[misc]
                    "dense": lambda n, x=x: linear(x, dense[n % len(dense)]),  # type: ignore[misc]
                },
            )
        return found

    def check(self) -> None:
        """Both libraries mean the same numbers.

        Raises:
            SystemExit: if they do not: there is nothing to compare.
        """
        ours = nf4.dequantize(self.packed[0], self.dtype)
        theirs = BF.dequantize_4bit(self.packed[0].codes, self.state)
        if not torch.equal(ours, theirs):
            most = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            differ = int((ours != theirs).sum())
            print(f"{self.shape}: {differ} of {ours.numel()} numbers differ, by {most:.1g} of the largest")
            if most > 1e-2:
                raise SystemExit("the two libraries do not unpack the same weight")


@torch.no_grad()
def kernels(shapes: dict[str, Sequence[tuple[int, int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds and shares of the bandwidth, for every layer, act and library."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    small = arguments.small
    copied = of_copy((16 if small else 1024) * MiB, arguments.repeats, device)
    built = of_memory(device)
    rows: list[dict[str, Any]] = []
    for model, layers in shapes.items():
        for shape in layers:
            layer = Layer(shape, 1 * MiB if small else COLD, device, dtype)
            layer.check()
            for act, (moved, calls) in layer.calls().items():
                for who, call in calls.items():
                    took = seconds(call, layer.many, arguments.repeats, device)
                    fair = moved if who != "dense" else moved - layer.bytes + bytes_of(layer.W)
                    row = {"model": model, "layer": list(shape), "act": act, "who": who, "microseconds": 1e6 * took}
                    row |= {"GB/s": fair / took / 1e9, "of a copy": fair / took / copied}
                    rows.append(row | {"of the memory": fair / took / built if built else None})
    return {"copy, GB/s": copied / 1e9, "memory, GB/s": built / 1e9 if built else None, "rows": rows}


def show(found: dict[str, Any], console: Console) -> None:
    """A row for every layer and act: microseconds, and the shares of lorary's."""
    title = f"bytes moved over time; a copy reaches {found['copy, GB/s']:.0f} GB/s"
    table = Table("layer", "act", title=title)
    for column in ("lorary, us", "of a copy", "of the memory", "bitsandbytes, us", "dense, us"):
        table.add_column(column, justify="right")
    rows = found["rows"]
    for first in (row for row in rows if row["who"] == "lorary"):
        beside = {row["who"]: row for row in rows if all(row[k] == first[k] for k in ("model", "layer", "act"))}
        share, built = first["of a copy"], first["of the memory"]
        others = [f"{beside[who]['microseconds']:.1f}" if who in beside else "-" for who in ("bitsandbytes", "dense")]
        table.add_row(
            f"{first['model']}, {first['layer'][0]} x {first['layer'][1]}",
            first["act"],
            f"{first['microseconds']:.1f}",
            f"{share:.0%}",
            f"{built:.0%}" if built else "-",
            *others,
        )
    console.print(table)


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--small", action="store_true", help="small layers, on the CPU where there is no GPU")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--out", type=Path, help="default: results/nf4-gpu.json; nowhere with --small")
    arguments = made.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        raise SystemExit("there is no GPU here that CUDA knows; --small runs on the CPU")
    arguments.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    if arguments.device.type == "cpu":
        console.print(f"on the CPU, by the code for CPUs ({nf4.backend()}): nothing here says anything about a GPU")
    found = {"kernels": kernels(SMALL if arguments.small else SHAPES, arguments)}
    show(found["kernels"], console)
    out = arguments.out or (None if arguments.small else Path(__file__).with_name("results") / "nf4-gpu.json")
    if out is not None:
        out.write_text(json.dumps(machine(arguments) | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
