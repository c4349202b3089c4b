"""Runs killed at random instants and resumed until they end: the same folders as without a kill, bit for bit.

`pytest --kills=100 tests/train/runner/test_kills.py` kills a hundred times, `make test` a dozen times. Every process is
a fork of this one, which has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.folder import RunFolder
from lorary.train.trainer import checkpoint
from tests.train.resume.processes import TIMES, child, contents
from tests.train.runs import base_folder, changed, configuration

# How the runs differ: in their schedule, their end, and which checkpoints stay.
RUNS: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant", "save_steps": 1, "save_total_limit": 2},
    "early stopping": {"max_steps": 12, "lr": 1e-6, "eval_steps": 1, "early_stopping_patience": 2},
    "keep_best": {"lr": 0.5, "eval_steps": 2, "keep_best": True, "save_total_limit": 1},
    "epochs": {
        "max_steps": None,
        "epochs": 1.6,  # ends in the middle of an epoch
        "gradient_accumulation_steps": 2,
        "eval_steps": None,
        "save_steps": 1,
        "save_total_limit": 3,
    },
}
NOT_COMPARED = (  # they tell times
    *("events.log", "README.md", "report.html"),
    *("trainer_state.json", "MANIFEST.json", "metrics.jsonl"),
)


def _train(tree: dict[str, Any]) -> None:
    done = run(from_dict(tree), resume=True, quiet=True)
    assert not done.interrupted


def _finish(tree: dict[str, Any]) -> None:
    assert os.waitpid(child(lambda: _train(tree)), 0)[1] == 0


def _folder(path: Path) -> dict[str, Any]:
    """All that a run leaves behind: names, bytes, checkpoints and metrics without the times in them."""
    files = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}
    found: dict[str, Any] = {n: p.read_bytes() if p.name not in NOT_COMPARED else None for n, p in files.items()}
    found["records"] = [
        {key: value for key, value in record.items() if not key.endswith(TIMES)} for record in RunFolder(path).history()
    ]
    found["config.resolved.yaml"] = found["config.resolved.yaml"].replace(path.name.encode(), b"")
    return found | {p.name: contents(p) for p in checkpoint.list_checkpoints(path / "checkpoints")}


def _untouched(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(path.rglob("*")) if p.is_file()}


def _kill(tree: dict[str, Any], path: Path, seconds: float) -> str:
    """Resumes and kills after a time on the processor, whatever else the machine does; where the run was then."""
    pid = child(lambda: _train(tree))
    clock = ~pid << 3 | 2  # of that process, as clock_getcpuclockid(3) numbers it on Linux
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            break
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    if status == 0:
        return "finished before"
    newest, _ = checkpoint.newest(path / "checkpoints")
    if RunFolder(path).finished():
        return "at its exit"
    if newest is None:
        return "before a checkpoint"
    record = json.loads((newest / checkpoint.TRAINER_STATE).read_text())
    stopping = record["stateful_callbacks"].get("EarlyStoppingCallback")
    early = stopping and stopping["attributes"]["early_stopping_patience_counter"] >= 2
    return "after the last step" if early or record["global_step"] >= record["max_steps"] else "between checkpoints"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, on which this process has run once, so that no child repeats the imports."""
    folder = base_folder(tmp_path_factory.mktemp("models") / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        _train(changed(configuration(folder, Path("data.jsonl")), "training", max_steps=1))
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("kills")
@pytest.mark.skipif(sys.platform != "linux", reason="the time of another process is read from Linux's clocks")
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_any_instant_and_resumed_it_is_the_same_run(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    kills, chance = -(-request.config.getoption("--kills") // len(RUNS)), random.Random(name)
    found, compared = Counter[str](), 0
    tree = changed(configuration(base, Path("data.jsonl")), "training", **RUNS[name])
    tree["method"] = {"name": "lora", "r": 4, "dropout": 0.2}
    start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    _finish(tree | {"output": "whole"})
    length, path = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start, Path("again")
    expected = _folder(Path("whole"))
    while sum(n for where, n in found.items() if where != "finished before") < kills:
        # half of the kills at any instant, half near the end, where adapter and pictures are written
        early = chance.random() < 0.5
        found[_kill(tree | {"output": "again"}, path, chance.uniform(0 if early else length / 2, length))] += 1
        if not RunFolder(path).finished():
            continue
        assert _folder(path) == expected
        before = _untouched(path)
        for _ in range(2):  # finished, it is finished
            _finish(tree | {"output": "again"})
            assert _untouched(path) == before
        compared += 1
        shutil.rmtree(path)
    _finish(tree | {"output": "again"})
    assert _folder(path) == expected
    print(f"{name}: {dict(found)}, {compared + 1} runs compared")
