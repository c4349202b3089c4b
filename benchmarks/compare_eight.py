"""Eight methods, three rates and two seeds through `lorary compare`, killed in the middle and started again.

    python benchmarks/compare_eight.py            # seven minutes on two cores
    python benchmarks/compare_eight.py --small    # a few steps of everything, to see that it runs

The command is a process of its own. After half of its runs it gets SIGKILL; the same command then goes on. What was
recorded before the kill has to stand in the end as it stood, with its files untouched. And runs of the search and of
the judgement, among them the one that the kill met, are repeated by `lorary train` from the configuration in their
folders: their adapters have to be equal bit for bit. The results go to `results/compare_eight.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import machine
from lorary.adapters.save_load import ADAPTER_FILES
from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Comparison, Trial
from lorary.files.atomic import atomic_file
from lorary.train.compare.ledger import FILE
from lorary.train.config.yaml_source import dump

RESULTS = Path(__file__).parent / "results" / "compare_eight.json"
METHODS = ("lora:r=8", "dora:r=8", "pissa:r=8", "lora+:r=8", "adalora:r=12:target=8", "vera:r=64", "houlsby", "ia3")
SEARCH, ROWS = {"rates": 3, "seeds": 2, "outward": 0}, {"validation_rows": 32, "test_rows": 96, "general_rows": 48}
BATCH = {"batch_size": 4, "eval_batch_size": 16, "gradient_accumulation_steps": 1}
STEPS, REPEATED = 40, 3
Record = dict[str, Any]


def configuration(steps: int, workers: int) -> Record:
    """The configuration of the comparison."""
    return {
        "model": "builtin:base",
        "data": {"train": "builtin:c-headers", "validation": "builtin:c-headers", "max_length": 128},
        "training": {"max_steps": steps, "lr": 2e-3} | BATCH,
        "compare": SEARCH | ROWS | {"methods": ",".join(METHODS), "workers": workers},
    }


def lorary(folder: Path, *arguments: str, threads: int | None = None) -> subprocess.Popen[bytes]:
    """The command as a process, in a folder, with its messages in a file there."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(folder / "messages.txt", "ab") as messages:
        command = [sys.executable, "-m", "lorary", *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=messages, stderr=messages)


def ended(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for the command.

    Raises:
        SystemExit: it failed; with its last messages.
    """
    if process.wait():
        text = (folder / "messages.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{text[-2000:]}")


def recorded(folder: Path) -> Comparison | None:
    """The record of the comparison; None before there is one."""
    file = folder / "comparison" / FILE
    return store.read(file) if file.is_file() else None


def killed_after(runs: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until so many runs are recorded and the next one is going on, then kill the process."""
    while process.poll() is None:
        found = recorded(folder)
        if found is not None and len(found.trials) >= runs and under_way(folder, found):
            process.kill()
        time.sleep(0.2)
    process.wait()
    if process.returncode != -9:
        ended(process, folder)
        raise SystemExit("the comparison ended before it could be killed")


def under_way(folder: Path, found: Comparison) -> list[str]:
    """The folders of runs that have begun to log, and are not recorded."""
    begun = (folder / "comparison" / "runs").glob("*/*/metrics.jsonl")
    names = {str(path.parent.relative_to(folder / "comparison")) for path in begun}
    return sorted(names - {trial.folder for trial in found.trials})


def files(folder: Path, trials: Sequence[Trial]) -> Mapping[str, tuple[int, int]]:
    """Name -> (time, bytes) of all files of recorded runs."""
    paths = [path for trial in trials for path in (folder / "comparison" / trial.folder).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def repeated(folder: Path, run: str, threads: int) -> bool:
    """Whether `lorary train`, with the configuration in a run's folder, makes the same adapter bit for bit."""
    there = folder / "comparison" / run
    shutil.rmtree(folder / "again", ignore_errors=True)
    arguments = ("train", str(there / "config.resolved.yaml"), "--set", "output=again", "--set", "data.validation=null")
    # rows are held out by data.validation alone, and evaluations change nothing that is trained
    process = lorary(folder, *arguments, "--set", "training.eval_steps=null", threads=threads)
    ended(process, folder)
    pairs = [(folder / "again" / "adapter" / name, there / "adapter" / name) for name in ADAPTER_FILES[:1]]
    return all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def measured(folder: Path, steps: int, workers: int) -> Record:
    """The comparison, killed once; what the kill cost, and what is equal."""
    (folder / "config.yaml").write_text(dump(configuration(steps, workers)), encoding="utf-8")
    command = ("compare", "config.yaml", "--quiet")
    start = time.monotonic()
    killed_after(5 * len(METHODS) // 2, lorary(folder, *command), folder)
    middle = time.monotonic()
    before = recorded(folder)
    assert before is not None
    met, kept = under_way(folder, before), files(folder, before.trials)
    ended(lorary(folder, *command), folder)
    end = time.monotonic()
    whole = recorded(folder)
    assert whole is not None
    print(f"{(end - start) / 60:.1f} minutes; now some runs are repeated by `lorary train`", flush=True)
    judged = [trial.folder for trial in whole.trials if trial.test is not None]
    again = [*met, *judged[:: max(1, len(judged) // REPEATED)]][: len(met) + REPEATED]
    finished = {trial.folder for trial in whole.trials if trial.ending == "finished"}
    threads = max(1, (os.cpu_count() or 1) // workers)
    equal = {run: repeated(folder, run, threads) for run in again if run in finished}
    return {
        "minutes": {"until_the_kill": round((middle - start) / 60, 2), "after_it": round((end - middle) / 60, 2)},
        "runs": {"before_the_kill": len(before.trials), "in_all": len(whole.trials), "met_by_the_kill": len(met)},
        "endings": {e: sum(t.ending == e for t in whole.trials) for e in sorted({t.ending for t in whole.trials})},
        "left_out": dict(whole.left_out),
        "recorded_runs_stand": set(before.trials) <= set(whole.trials),
        "their_files_are_untouched": files(folder, before.trials) == kept,
        "repeated_by_train_bit_for_bit": equal,
        "minutes_of_repeating": round((time.monotonic() - end) / 60, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--workers", type=int, default=2, help="processes of the comparison")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compare-eight-"))
    try:
        found = measured(folder, 6 if arguments.small else arguments.steps, arguments.workers)
        shown = subprocess.run(
            [sys.executable, "-m", "lorary", "compare", "comparison"],
            cwd=folder, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    finally:
        shutil.rmtree(folder)
    print(shown, json.dumps(found, indent=2), sep="\n")
    minutes = sum(found["minutes"].values())
    print(f"{minutes:.1f} minutes for {found['runs']['in_all']} runs, killed once")
    if found["left_out"] or not found["repeated_by_train_bit_for_bit"]:
        raise SystemExit("a run was left out, or none was repeated")
    if not (found["recorded_runs_stand"] and found["their_files_are_untouched"]):
        raise SystemExit("a run was done again")
    if not all(found["repeated_by_train_bit_for_bit"].values()):
        raise SystemExit("a run is not the one that its configuration makes")
    if not arguments.small:
        record = {"machine": machine(arguments), "config": configuration(arguments.steps, arguments.workers)} | found
        with atomic_file(RESULTS) as file:
            file.write(json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
