"""LoRAHub on the built-in base: an unseen mixture of two styles from five examples, beside each adapter and their mean.

    python benchmarks/lorahub.py --budgets 40 80      # five adapters, three mixtures, three seeds, both forms
    python benchmarks/lorahub.py --small              # to check the script

Five adapters learn one style each: C headers, prose, docstrings, prose in capitals, code read backwards. A mixture has
rows of 128 tokens, half of one style and half of another. The weights are searched on five rows; every loss in the
table is on 48 other rows, from other parts of the held-out files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lorary
from cases import machine
from lorary import builtin
from lorary.adapters.compose.weighted_factors import WeightedFactors
from lorary.builtin import corpora

STYLES: dict[str, tuple[str, Callable[[str], str]]] = {  # name -> its built-in data, and what is done to a text
    "c": ("builtin:c-headers", str),
    "prose": ("builtin:topics", str),
    "docstrings": ("builtin:docstrings", str),
    "capitals": ("builtin:topics", str.upper),
    "backwards": ("builtin:python", lambda text: text[::-1]),
}
MIXTURES = (("c", "docstrings"), ("docstrings", "prose"), ("c", "prose"))
LETTERS = {"train": 300_000, "validation": 60_000}  # of each style
WIDTH, EXAMPLES, HELD_OUT = 128, 5, 48

Tokens = Mapping[str, Tensor]


def styles(tokenizer: Any, split: str) -> dict[str, Tensor]:
    """style -> its tokens in a line."""
    found = {}
    for name, (data, change) in STYLES.items():
        text = "\n".join(change("".join(record.values())) for record in corpora.load(data, split, fallback=True))
        found[name] = torch.tensor(tokenizer(text[: LETTERS[split]])["input_ids"])
    return found


def windows(tokens: Tensor, count: int, width: int, seed: int) -> Tensor:
    """Pieces of a line of tokens, drawn at random [count, width]."""
    starts = torch.randint(len(tokens) - width, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[start : start + width] for start in starts])


def mixture(tokens: Tokens, names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Rows that change from one style to another in the middle [count, WIDTH]."""
    return torch.cat([windows(tokens[name], count, WIDTH // 2, seed) for name in names], 1)


def train(model: Any, tokens: Tensor, steps: int) -> lorary.Adapter:
    """An adapter that has learned a style; the model is its base again."""
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4, alpha=8)))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=2e-3))
    for step in range(steps):
        batch = windows(tokens, 8, 96, step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = lorary.Adapter.of(model)
    lorary.detach(model)
    return adapter


@torch.no_grad()
def loss(model: Any, adapter: lorary.Adapter | None, rows: Tensor) -> float:
    """The loss of the base with an adapter; the model is its base again."""
    lorary.switch(model, adapter)
    value = float(model(input_ids=rows, labels=rows).loss)
    lorary.switch(model, None)
    return value


def searched(model: Any, adapters: Mapping[str, lorary.Adapter], few: Tensor, rows: Tensor, **options: Any) -> Any:
    """A search, its result on other rows, and its time."""
    start = time.perf_counter()
    found = lorary.lorahub(model, adapters, {"input_ids": few, "labels": few}, **options)
    seconds = time.perf_counter() - start
    return {
        **options,
        "weights": dict(zip(found.names, found.weights, strict=True)),
        "examples": {"base": found.losses[0], "mixture": found.loss},
        "objectives": [candidate.objective for candidate in found.candidates],
        "held_out": loss(model, found.adapter, rows),
        "seconds": seconds,
    }


def measured(model: Any, adapters: Mapping[str, lorary.Adapter], tokens: Tokens, names: Any, options: Any) -> Any:
    """All losses on one mixture; the first half of the held-out tokens gives the examples, the second half the rows."""
    first, second = ({n: t[: len(t) // 2] for n, t in tokens.items()}, {n: t[len(t) // 2 :] for n, t in tokens.items()})
    rows = mixture(second, names, HELD_OUT, seed=1000)
    sums = WeightedFactors(model, adapters, summed=False)
    n = len(adapters)
    return {
        "base": loss(model, None, rows),
        "single": {name: loss(model, adapter, rows) for name, adapter in adapters.items()},
        "mean": loss(model, sums.adapter([1 / n] * n), rows),
        "sum": loss(model, sums.adapter([1.0] * n), rows),
        "searches": [
            searched(model, adapters, mixture(first, names, EXAMPLES, seed), rows, form=form, seed=seed, budget=budget)
            for form in ("product", "factor")
            for budget in options.budgets
            for seed in range(options.seeds)
        ],
    }


def table(results: Mapping[str, Any]) -> Table:
    """Losses by mixture: the base, the best adapter, their mean and sum, and each search."""
    head = ("mixture", "base", "best adapter", "mean", "sum", "LoRAHub", "by seed", "weights of the first")
    found = Table(*head, title="held-out loss")
    for name, r in results.items():
        best = min(r["single"], key=r["single"].get)
        row = [name, f"{r['base']:.4f}", f"{r['single'][best]:.4f} ({best})", f"{r['mean']:.4f}", f"{r['sum']:.4f}"]
        for form, budget in dict.fromkeys((s["form"], s["budget"]) for s in r["searches"]):
            runs = [s for s in r["searches"] if (s["form"], s["budget"]) == (form, budget)]
            losses = " ".join(f"{s['held_out']:.4f}" for s in runs)
            weights = " ".join(f"{n} {w:+.2f}" for n, w in runs[0]["weights"].items())
            seconds = sum(s["seconds"] for s in runs)
            found.add_row(*row, f"{form}, {budget} in {seconds:.0f} s", losses, weights)
            row = [""] * len(row)
    return found


def main() -> None:
    """Train the adapters, search on every mixture, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each adapter")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[40], help="candidates of a search")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        options.steps, options.seeds, options.budgets = 2, 1, [4]
    torch.set_num_threads(options.threads)
    model, tokenizer = builtin.load_model(), builtin.load_tokenizer()
    learned, unseen = styles(tokenizer, "train"), styles(tokenizer, "validation")
    console = Console(file=sys.stderr)
    names = track(STYLES, "training", console=console)
    adapters = {name: train(model, learned[name], options.steps) for name in names}
    results = {
        " + ".join(names): measured(model, adapters, unseen, names, options)
        for names in track(MIXTURES[:1] if options.small else MIXTURES, "searching", console=console)
    }
    Console(width=180).print(table(results))
    if not options.small:
        file = Path(__file__).parent / "results" / "lorahub.json"
        record = {"machine": machine(options), "mixtures": results}
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
