"""kill -9 at a hundred random instants: every time whole checkpoints, none lost, and at the end the very same run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorary
from lorary.files.atomic import TEMPORARY, remove_stale
from lorary.files.manifest import NAME, verify_manifest
from lorary.train.trainer import checkpoint
from tests.train.resume.processes import child, contents
from tests.train.runs import adapted, sft

KILLS, STEPS = 100, 3
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "warmup_steps": 0,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,  # so that an old one is being removed too
}


def _trainer(folder: Path) -> Callable[[], None]:
    """A trainer that is ready, for children to go on with; every one of them takes it as it is made here."""
    t = sft(folder, adapted(dropout=0.2, targets=["q_proj", "v_proj"]), **SETTINGS)

    def train() -> None:
        transformers.set_seed(t.args.seed)  # as a trainer does when it is made
        t.train(resume_from_checkpoint=checkpoint.newest(folder)[0] is not None)

    return train


def _ended(pid: int, seconds: float) -> bool:
    """Waits; whether the child has ended by itself meanwhile."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.0005)
    return False


def _writes(folder: Path, pid: int) -> bool:
    """Waits until the child writes a checkpoint; False where it ends before it does."""
    while not any(name.startswith(TEMPORARY) for name in os.listdir(folder)):
        if _ended(pid, 0.0005):
            return False
    return True


def _killed(folder: Path, train: Callable[[], None], chance: random.Random, length: float) -> bool:
    """Trains and kills; False where the run had come to its end before that.

    Half of the kills come at any instant of a run, half soon after it has begun to write a checkpoint.
    """
    remove_stale(folder)
    pid = child(train)
    if chance.random() < 0.5:
        _ended(pid, chance.uniform(0, length))
    elif _writes(folder, pid):
        _ended(pid, chance.uniform(0, length / STEPS / 2))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL)
    return bool(status)


def _looked_at(folder: Path) -> int:
    """Reads every checkpoint that looks complete as a whole; the step of the newest, 0 where there is none."""
    complete = [path for path in checkpoint.list_checkpoints(folder) if (path / NAME).is_file()]
    for path in complete:
        step = checkpoint.step_of(path)
        assert verify_manifest(path)["step"] == step
        assert checkpoint.read(path)["scheduler"]["last_epoch"] == step
        assert lorary.load_adapter(path / checkpoint.ADAPTER).sites
    return checkpoint.step_of(complete[-1]) if complete else 0


@pytest.mark.slow
def test_a_hundred_kills_cost_no_checkpoint_and_change_no_bit(tmp_path: Path) -> None:
    """A run is killed and resumed until it is through; then the next one, until there were a hundred kills."""
    straight, folder, chance, found = tmp_path / "straight", tmp_path / "run", random.Random(4), Counter[str]()
    train = _trainer(straight)
    start = time.monotonic()
    assert os.waitpid(child(train), 0)[1] == 0
    length = time.monotonic() - start
    expected = contents(straight / f"checkpoint-{STEPS}")
    train = _trainer(folder)
    while found["killed"] < KILLS:
        folder.mkdir(exist_ok=True)
        newest = 0
        while newest < STEPS:
            if _killed(folder, train, chance, length):
                found["killed"] += 1
                found["while writing"] += any(folder.glob(f"{TEMPORARY}*"))
            before, newest = newest, _looked_at(folder)
            assert newest >= before
            found["went on"] += bool(before)
        assert contents(folder / f"checkpoint-{STEPS}") == expected
        found["runs"] += 1
        shutil.rmtree(folder)
    assert found["killed"] >= KILLS
    assert found["while writing"] >= KILLS / 10
    assert found["went on"] >= KILLS / 4
    assert found["runs"] >= KILLS / 20
