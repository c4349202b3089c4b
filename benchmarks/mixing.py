"""Merges of trained adapters on the built-in base: sums, slerp, TIES, DARE and pruning, on what each parent learned.

    python benchmarks/mixing.py               # three pairs of adapters
    python benchmarks/mixing.py --small       # to check the script

Each adapter learns one style of `lorahub.py`. Losses are means over 48 held-out rows of 96 tokens of a style; the error
is that of the update at the rank of the sum, relative, in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lorary
from cases import machine
from lorahub import MIXTURES, loss, styles, train, windows
from lorary import builtin

ROWS, LENGTH = 48, 96
WAYS: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "sum": ((1, 1), {}),
    "mean": ((0.5, 0.5), {}),
    "mean, rank 4": ((0.5, 0.5), {"rank": 4}),
    "slerp": ((0.5, 0.5), {"how": "slerp"}),
    "magnitude 0.2": ((1, 1), {"how": "magnitude"}),
    "magnitude 0.5": ((1, 1), {"how": "magnitude", "density": 0.5}),
    "ties 0.2": ((1, 1), {"how": "ties"}),
    "ties 0.5": ((1, 1), {"how": "ties", "density": 0.5}),
    "ties 0.5, rank 32": ((1, 1), {"how": "ties", "density": 0.5, "rank": 32}),
    "dare 0.5": ((1, 1), {"how": "dare", "density": 0.5}),
    "dare 0.5, rank 32": ((1, 1), {"how": "dare", "density": 0.5, "rank": 32}),
    "dare-ties 0.5": ((1, 1), {"how": "dare-ties", "density": 0.5}),
    "first - 0.5 second": ((1, -0.5), {}),
}


def measured(model: Any, pair: tuple[lorary.Adapter, lorary.Adapter], rows: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """name -> the losses on both styles, the error and the seconds of each merge."""
    found: dict[str, Any] = {}
    for name, adapter in (("base", None), ("first alone", pair[0]), ("second alone", pair[1])):
        found[name] = {"losses": [loss(model, adapter, each) for each in rows]}
    for name, (weights, options) in WAYS.items():
        start = time.perf_counter()
        mixed = lorary.mix(pair, weights, **options)
        seconds = time.perf_counter() - start
        error = mixed.provenance.settings.get("error", 0.0) if mixed.provenance else 0.0
        rank = max(s.r for s in mixed.sites)
        losses = [loss(model, mixed, each) for each in rows]
        found[name] = {"losses": losses, "error": error, "rank": rank, "seconds": seconds}
    return found


def table(results: Mapping[str, Any]) -> Table:
    """The losses of each pair on the first and on the second style, and the error, by merge."""
    found = Table(
        "merge", *(f"{pair}, error" for pair in results), title="held-out loss on the first, the second style"
    )
    for name in next(iter(results.values())):
        cells = [(r[name]["losses"], r[name].get("error", 0.0)) for r in results.values()]
        found.add_row(name, *(f"{a:.3f}  {b:.3f}  {error:.1%}" for (a, b), error in cells))
    return found


def main() -> None:
    """Train the adapters, merge every pair in every way, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each adapter")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    options.steps = 2 if options.small else options.steps
    torch.set_num_threads(options.threads)
    model, tokenizer = builtin.load_model(), builtin.load_tokenizer()
    learned, unseen = styles(tokenizer, "train"), styles(tokenizer, "validation")
    console = Console(file=sys.stderr)
    pairs = MIXTURES[:1] if options.small else MIXTURES
    names = sorted({name for pair in pairs for name in pair})
    adapters = {name: train(model, learned[name], options.steps) for name in track(names, "training", console=console)}
    rows = {name: windows(unseen[name], ROWS, LENGTH, seed=1000) for name in names}
    results = {
        f"{a} + {b}": measured(model, (adapters[a], adapters[b]), (rows[a], rows[b]))
        for a, b in track(pairs, "merging", console=console)
    }
    Console(width=140).print(table(results))
    if not options.small:
        file = Path(__file__).parent / "results" / "mixing.json"
        record = {"machine": machine(options), "pairs": results}
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
