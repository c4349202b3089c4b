"""The papers' claims at the size of the built-in base: every one measured, and whether it holds there.

    python benchmarks/claims [--only NAME] [--seeds N] [--quick] [--out FILE]

Every finished run is kept at once: started again, the benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from claims import ROWS
from ledger import Ledger
from protocol import MOST_SEEDS, Bench
from training import FULL, QUICK

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/claims", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(ROWS), help="a claim; may be said again")
    parser.add_argument("--seeds", type=int, choices=range(2, MOST_SEEDS + 1), metavar="N", help="pairs of runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "claims.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    size = QUICK if arguments.quick else FULL
    bench = Bench(Ledger(arguments.out), replace(size, seeds=arguments.seeds or size.seeds))
    for name in arguments.only or ROWS:
        for row in ROWS[name]:
            found = row.difference(bench)
            print(f"{name}: {row.what}: {found.mean:+.4f} +- {found.half:.4f} {row.unit}: {row.verdict(found)}")


if __name__ == "__main__":
    main()
