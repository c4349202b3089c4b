"""PiSSA's start on a large weight: the randomised decomposition beside the exact one, in time and in what is left.

    python benchmarks/start.py

The weight has the spectrum of a trained one: singular values that fall off as 1/sqrt(i) over a floor of noise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cases import machine, new_table
from lorary.methods.olora import QRInit
from lorary.methods.pissa import SVDInit
from lorary.spec.site import Site


def weight(width: int) -> Tensor:
    """[width, width], in float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(width, 256, generator=generator))[0] for _ in range(2))
    values = 20 / torch.arange(1, 257).sqrt()
    return (left * values) @ right.T + 0.02 * torch.randn(width, width, generator=generator)


def largest(M: Tensor) -> float:
    """The top singular value, by power iteration until it stands still."""
    v, before = torch.ones(M.shape[1]), 0.0
    for _ in range(2000):
        u = M @ v
        v = M.T @ (u / u.norm())
        now = float(v.norm())
        if abs(now - before) <= 1e-7 * now:
            break
        before, v = now, v / now
    return now


def start(init: Any, W: Tensor, r: int) -> tuple[float, float]:
    """Seconds, and the residual's top singular value."""
    p = {"A": torch.zeros(r, W.shape[1]), "B": torch.zeros(W.shape[0], r)}
    site = Site("layer", "linear", *W.shape, bias=False)
    begun = time.perf_counter()
    init(p, W, site, 1.0, torch.Generator().manual_seed(1))
    seconds = time.perf_counter() - begun
    return seconds, largest(W - p["B"] @ p["A"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "start.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    W = weight(arguments.width)
    inits = {
        "PiSSA, exact": SVDInit(),
        "PiSSA, niter=1": SVDInit(niter=1),
        "PiSSA, niter=4": SVDInit(niter=4),
        "OLoRA": QRInit(),
    }
    found = {name: start(init, W, arguments.rank) for name, init in inits.items()}
    exact = found["PiSSA, exact"]
    columns = ("seconds", "times faster than exact", "residual's top singular value", "over exact")
    table = new_table(f"a start of rank {arguments.rank} in a weight {arguments.width} x {arguments.width}", *columns)
    for name, (seconds, top) in found.items():
        table.add_row(name, f"{seconds:.2f}", f"{exact[0] / seconds:.1f}", f"{top:.4f}", f"{top / exact[1] - 1:+.3%}")
    Console().print(table)
    result = {name: {"seconds": seconds, "residual_top": top} for name, (seconds, top) in found.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "start": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
