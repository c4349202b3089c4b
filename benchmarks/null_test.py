"""What `lorary.compare` says of methods whose difference is known: none, a planted worse one, a planted better one.

    python benchmarks/null_test.py            # ten minutes of a core; goes on where it was
    python benchmarks/null_test.py --small    # a few steps of everything, to see that it runs

null      LoRA against LoRA under another name, 20 comparisons: at least 19 should show no difference
worse     LoRA against LoRA whose three rates are a hundredth of them
better    LoRA against a reference that adapts q alone, at rank 1

Each comparison has its own seeds and its own split of the rows, three rates and two judged seeds. The built-in base
learns to write documentation. The results go to `results/null_test.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import lorary
from cases import machine
from lorary.analysis.comparison.record import Arm
from lorary.analysis.comparison.statistics import findings
from lorary.model.text_table import aligned
from lorary.train.compare.settings import Settings
from lorary.train.config.load import from_dict

RESULTS = Path(__file__).parent / "results" / "null_test.json"
RATES = (2e-3, 6e-3, 2e-2)
LORA = {"name": "lora", "r": 4, "alpha": 8.0, "targets": "all-linear"}
Q_ALONE = {"name": "lora", "r": 1, "alpha": 2.0, "targets": "q_proj"}
FIRST = Arm("LoRA", LORA, RATES)
KINDS = {  # kind -> (the second arm, the verdict, comparisons); of `better`, the second arm is the reference
    "null": (Arm("LoRA, too", LORA, RATES), "no difference shown", 20),
    "worse": (Arm("LoRA, rates ÷ 100", LORA, tuple(rate / 100 for rate in RATES)), "worse", 5),
    "better": (Arm("LoRA, q alone", Q_ALONE, RATES), "better", 5),
}
STEPS, ROWS, LENGTH = 16, 200, 64
Record = dict[str, Any]


def compared(kind: str, number: int, small: bool) -> Record:
    """One comparison: the difference of its arms, and the verdict."""
    tree = {
        "model": "builtin:base",
        "data": {"train": {"path": "builtin:docstrings", "limit": ROWS}, "validation_split": 0.5, "max_length": LENGTH},
        "training": {
            "max_steps": 2 if small else STEPS,
            "batch_size": 4,
            "eval_batch_size": 32,
            "gradient_accumulation_steps": 1,
            "seed": 1000 * number,
        },
    }
    settings = Settings(outward=0, seeds=2, general=(), validation_rows=32, test_rows=64)
    start, folder = time.time(), tempfile.mkdtemp(prefix="null-test-")
    try:
        comparison = lorary.compare(from_dict(tree), [FIRST, KINDS[kind][0]], settings, Path(folder) / "comparison")
    finally:
        shutil.rmtree(folder)
    if comparison.left_out:
        raise SystemExit(f"{kind} {number}: {comparison.left_out}")
    found = findings(comparison, (KINDS[kind][0] if kind == "better" else FIRST).name)
    (difference,) = found.against_reference.values()
    standings = {one.arm: one for one in found.standings}
    return {
        "kind": kind,
        "number": number,
        "verdict": difference.verdict,
        "difference": round(difference.joint.value, 5),
        "interval": [round(difference.joint.low, 5), round(difference.joint.high, 5)],
        "rates": [standings[arm.name].lr for arm in comparison.arms],
        "losses": [[round(t.test.loss, 5) for t in comparison.of(a.name) if t.test] for a in comparison.arms],
        "seconds": round(time.time() - start, 1),
    }


def summary(rows: list[Record]) -> list[Record]:
    """For each kind the number of comparisons, and how many say what is known."""
    return [
        {
            "kind": kind,
            "expected": expected,
            "comparisons": len(mine := [row for row in rows if row["kind"] == kind]),
            "as_expected": sum(row["verdict"] == expected for row in mine),
        }
        for kind, (_, expected, _) in KINDS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    arguments = parser.parse_args()
    small = arguments.small
    path = Path(tempfile.mkdtemp()) / RESULTS.name if small else RESULTS
    design = {"steps": STEPS, "rows": ROWS, "length": LENGTH, "lora": LORA, "rates": list(RATES), "seeds": 2}
    head = {"machine": machine(arguments), "design": design}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"design": design, "rows": []}
    if before["design"] != design:
        raise SystemExit(f"{path} is of another design: remove it")
    rows: list[Record] = before["rows"]
    done = {(row["kind"], row["number"]) for row in rows}
    for kind, (_, _, count) in KINDS.items():
        for number in range(1, (1 if small else count) + 1):
            if (kind, number) in done:
                continue
            rows.append(compared(kind, number, small))
            print(json.dumps(rows[-1]), flush=True)
            lines = ",\n  ".join(map(json.dumps, rows))
            text = json.dumps(head | {"summary": summary(rows)})[:-1] + f', "rows": [\n  {lines}\n]}}\n'
            beside = path.with_suffix(".part")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
    table = [("kind", "expected", "comparisons", "as expected")]
    table += [(s["kind"], s["expected"], str(s["comparisons"]), str(s["as_expected"])) for s in summary(rows)]
    print(*aligned(table), sep="\n")


if __name__ == "__main__":
    main()
