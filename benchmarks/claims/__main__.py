"""The papers' claims at the size of the built-in base: every one measured, and whether it holds there.

    python benchmarks/claims [--only NAME] [--seeds N] [--quick] [--out FILE] [--report] [--check]

Every finished run is kept at once: started again, the benchmark goes on where it was. In the end the table goes into
the page beside it and the picture into the results.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import continual
import report
import torch
from ledger import Ledger
from protocol import MOST_SEEDS, Bench
from training import FULL, QUICK
from transformers.utils import logging

import memory
from claims import ROWS, judged

HERE = Path(__file__).parent.parent
RESULTS, PAGE = HERE / "results" / "claims.json", HERE / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/claims", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(ROWS), help="a claim; may be said again")
    parser.add_argument("--seeds", type=int, choices=range(2, MOST_SEEDS + 1), metavar="N", help="pairs of runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--check", action="store_true", help="run and write nothing: is the page that of the runs?")
    parser.add_argument("--out", type=Path, help="the file of the runs; the page is left alone then")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:  # figures that mean nothing
        arguments.out = Path(tempfile.mkdtemp(prefix="claims-"), "claims.json")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    size, out = QUICK if arguments.quick else FULL, arguments.out or RESULTS
    bench = Bench(Ledger(out), replace(size, seeds=arguments.seeds or size.seeds), reads=arguments.report)
    if arguments.check:
        raise SystemExit(report.difference(PAGE, report.page(replace(bench, reads=True))))
    if not arguments.report:
        memory.measured(bench)
        if "o-lora" in (arguments.only or ROWS):
            continual.weights(bench)
        for row in [row for name in arguments.only or ROWS for row in ROWS[name]]:
            row.figures(bench)
    text = report.page(replace(bench, reads=True))
    out.with_suffix(".svg").write_text(report.picture(judged(replace(bench, reads=True))), encoding="utf-8")
    print(text)
    if arguments.out is None:
        report.into(PAGE, text)


if __name__ == "__main__":
    main()
