"""Every method: 20 steps straight, and the last 10 again from what a kill after step 13 leaves: the same checkpoints.

The folder at step 13 is what kill -9 leaves there, so one run serves as the uninterrupted and as the killed one. Real
kills are in `test_run` and `test_hundred_kills`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lorary
from lorary.layers.adapted import adapted_layers as adapters
from lorary.model.optim.rules import Rules
from lorary.train.trainer import checkpoint
from tests.train.resume.processes import contents, forked
from tests.train.runs import adapted, frozen, llama, rows, sft

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
NO_DROPOUT = {"pissa", "olora", "loftq", "lora-ga", "corda", "glora", "delta-lora"}
ALONE: dict[str, dict[str, Any]] = {  # their joins train by themselves: without a rank, dropout or targets
    "houlsby": {"m": 8},
    "ia3": {},
    "rows": {"tokens": (7, 8, 30)},
    "prefix-tuning": {"tokens": 3},
    "prompt-tuning": {"tokens": 3},
}
TARGETS = ["all-linear", "lm_head"]


def _model(*presets: str, **options: Any) -> Any:
    dropout = {} if NO_DROPOUT & set(presets) else {"dropout": 0.2}
    targets = "all-linear" if "loftq" in presets else TARGETS  # the head is not quantised
    return adapted(*presets, attention_dropout=0.2, targets=targets, **dropout, **options)


def _alone(name: str, **options: Any) -> Any:
    model = llama(attention_dropout=0.2)
    return lorary.attach(model, lorary.plan(model, lorary.method(name, **options)))


def _second_task(**options: Any) -> Any:
    """O-LoRA on what an earlier task has left behind."""
    first = adapted("o-lora", targets=TARGETS, seed=7)
    with torch.no_grad():
        for layer in adapters(first).values():
            layer.params["B"].normal_(std=0.02)
    model = llama(attention_dropout=0.2)
    method = lorary.method("o-lora", r=3, dropout=0.2, **options)
    return lorary.attach(model, lorary.plan(model, method, TARGETS, after=[lorary.Adapter.of(first)]))


def _cases() -> dict[str, Callable[[], Any]]:
    """Every preset that makes adapters, and what else goes on in another way."""
    names = [name for name, preset in lorary.presets().items() if preset.adapts and name not in ALONE]
    names.remove("alora")  # its targets are inside of the blocks
    options: dict[str, dict[str, Any]] = {
        "delta-lora": {"start": 5},
        "longlora": {"length": 4096},
        "adalora": {"target": 2},  # the choice stands from step 14 on: after the resumption
    }
    cases: dict[str, Callable[[], Any]] = {n: lambda n=n: _model(n, **options.get(n, {})) for n in names}
    cases |= {n: lambda n=n: _alone(n, **ALONE[n]) for n in ALONE}
    return cases | {
        "alora": lambda: _alone("alora", invocation=(30,), dropout=0.2),
        "prefix-tuning of a network": lambda: _alone("prefix-tuning", tokens=3, mlp=6),
        "dora+rslora+pissa+lora+": lambda: _model("dora", "rslora", "pissa", "lora+"),
        "qlora+dora+rslora+pissa+lora+": lambda: _model("qlora", "dora", "rslora", "pissa", "lora+", rounds=3),
        "vera+dora": lambda: _model("vera", "dora"),
        "glora supernet": lambda: _model("glora", supernet=True),
        "adalora, final before": lambda: _model("adalora", target=2, start=2, final=13, every=2, form="paper"),
        "delta-lora from step 15": lambda: _model("delta-lora", start=14),
        "delta-lora from the start": lambda: _model("delta-lora", start=-1),
        "delta-lora as in the paper": lambda: _model("delta-lora", start=5, mode="paper"),
        "o-lora, second task": lambda: _second_task(weight=5.0),
        "o-lora, second task, hard": lambda: _second_task(hard=True),
    }


CASES = _cases()


class CopyAt(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Copies the trainer's folder at the end of step 13."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 13:
            shutil.copytree(args.output_dir, self.target)


def _run(folder: Path, case: str, *, copy: Path | None = None, resume: bool = False) -> str:
    """Trains 20 steps, with dropout; a fingerprint of the parameters that never train."""
    t = sft(folder, CASES[case](), held_out=rows(4), **SETTINGS)
    if copy is not None:
        t.add_callback(CopyAt(copy))
    t.train(resume_from_checkpoint=resume)
    return frozen(t.model)


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_it_is_the_same_run(tmp_path: Path, case: str) -> None:
    """Adapter, every tensor of the optimizer and of the rules, random numbers and the log: bit for bit."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    status, base = forked(lambda: _run(straight, case, copy=killed))
    assert status == 0
    assert [path.name for path in killed.iterdir()] == ["checkpoint-10"]
    assert checkpoint.newest(killed)[0] == killed / "checkpoint-10"
    status, resumed = forked(lambda: _run(killed, case, resume=True))
    assert status == 0
    assert resumed == base
    whole, again = (contents(folder / "checkpoint-20") for folder in (straight, killed))
    assert whole.keys() == again.keys()
    assert [name for name in whole if whole[name] != again[name]] == []
    assert contents(straight / "checkpoint-10")[checkpoint.TENSORS] != whole[checkpoint.TENSORS]


def test_the_comparison_notices_a_rule_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: AdaLoRA goes on counting its steps, but its scores begin anew."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    forked(lambda: _run(straight, "adalora", copy=killed))
    monkeypatch.setattr(Rules, "load_state_dict", lambda self, flat: setattr(self, "step", int(flat["step"])))
    status, _ = forked(lambda: _run(killed, "adalora", resume=True))
    assert status == 0
    whole, again = (contents(folder / "checkpoint-20") for folder in (straight, killed))
    assert [name for name in whole if whole[name] != again.get(name)] != []
    assert whole["log"] != again["log"]
