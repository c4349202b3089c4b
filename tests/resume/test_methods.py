"""Every method: 20 steps straight, and 10 + kill -9 + 10; then everything in the last checkpoints is the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import lorary
from lorary.train import checkpoint
from tests.resume.processes import contents, forked
from tests.train.runs import adapted, frozen, rows, sft

# An epoch has 12 steps: the run resumes in the middle of the first and ends in the second.
SETTINGS: dict[str, Any] = {
    "gradient_accumulation_steps": 1,
    "max_steps": 20,
    "save_strategy": "steps",
    "save_steps": 10,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 8,
}
START_ELSEWHERE = {"pissa", "olora", "glora"}  # they take no dropout


def _model(*presets: str, **options: Any) -> Any:
    dropout = {} if START_ELSEWHERE & set(presets) else {"dropout": 0.2}
    return adapted(*presets, attention_dropout=0.2, targets=["all-linear", "lm_head"], **dropout, **options)


def _cases() -> dict[str, Callable[[], Any]]:
    """Every preset that makes adapters, and what else goes on in another way."""
    names = [name for name, preset in lorary.presets().items() if preset.adapts]
    cases: dict[str, Callable[[], Any]] = {name: lambda name=name: _model(name) for name in names}
    return cases | {
        "dora+rslora+pissa+lora+": lambda: _model("dora", "rslora", "pissa", "lora+"),
        "vera+dora": lambda: _model("vera", "dora"),
        "glora supernet": lambda: _model("glora", supernet=True),
    }


CASES = _cases()


class Kill(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Kills this very process at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(folder: Path, case: str, *, kill: int = 0, resume: bool = False) -> str:
    """Trains 20 steps, with dropout; a fingerprint of what never trains."""
    t = sft(folder, CASES[case](), held_out=rows(4), **SETTINGS)
    t.add_callback(Kill(kill))
    t.train(resume_from_checkpoint=resume)
    return frozen(t.model)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_it_is_the_same_run(tmp_path: Path, case: str) -> None:
    """Adapter, every tensor of the optimizer and of the rules, random numbers and the log: bit for bit."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    status, base = forked(lambda: _run(straight, case))
    assert status == 0
    status, _ = forked(lambda: _run(killed, case, kill=13))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoint.newest(killed)[0] == killed / "checkpoint-10"
    status, resumed = forked(lambda: _run(killed, case, resume=True))
    assert status == 0
    assert resumed == base
    whole, again = (contents(folder / "checkpoint-20") for folder in (straight, killed))
    assert whole.keys() == again.keys()
    assert [name for name in whole if whole[name] != again[name]] == []
    assert contents(straight / "checkpoint-10")[checkpoint.TENSORS] != whole[checkpoint.TENSORS]
