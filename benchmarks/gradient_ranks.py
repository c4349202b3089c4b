"""Ranks from one batch's gradients beside uniform ranks with as many numbers, by `lorary compare`'s own code.

    python benchmarks/gradient_ranks.py            # ten minutes of a core; goes on where it was with --folder
    python benchmarks/gradient_ranks.py --small    # two steps of everything, to see that it runs

Two arms on two built-in sets: LoRA of rank 8 at all linear layers, and LoRA whose ranks follow the gradients of 16
training rows. Both get the same search for their rate and two seeds, and are judged on rows that no choice has seen.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lorary
from compared import HEADERS, TOPICS, Asked, lora, run, tree
from lorary import builtin
from lorary.train.advice.gradient import ROWS, padded
from lorary.train.config.load import from_dict
from lorary.train.data.spread import spread
from lorary.train.runner.prepare import prepare

R = 8  # between 2 and 32 from gradients
DATA = {"gradient-ranks": HEADERS, "gradient-ranks-prose": TOPICS}


def gradient_ranks(asked: Asked) -> dict[str, int]:
    """A rank for each layer, from a batch of the training rows."""
    base = prepare(from_dict(tree(asked) | {"method": lora(R)}))
    batch = padded(spread(base.train.rows, ROWS), base.tokenizer.pad_token_id, base.config.data.max_length)
    model = builtin.load_model()
    return lorary.ranks_from_gradients(model, batch, base.config.plan(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=list(DATA), help="one of the comparisons")
    parser.add_argument("--small", action="store_true", help="two steps of everything, to see that it runs")
    parser.add_argument("--folder", type=Path, help="for the runs; by default a new temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="gradient-ranks-"))
    for name in [arguments.only] if arguments.only else DATA:
        uniform: dict[str, Any] = lora(R)
        ranks = gradient_ranks(Asked({}, DATA[name]))
        asked = Asked({"uniform ranks": uniform, "ranks from gradients": uniform | {"ranks": ranks}}, DATA[name])
        run(name, asked, folder, arguments.small, command=f"python benchmarks/gradient_ranks.py --only {name}")


if __name__ == "__main__":
    main()
