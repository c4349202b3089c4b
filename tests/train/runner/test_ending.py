"""How a run ends: that it stopped early, and the step whose adapter it keeps, is said at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorary.adapters import load_adapter
from lorary.train import Run, run
from lorary.train.config.load import from_dict
from tests.train.runs import base_folder, changed, configuration

OUT = Path("out")


@pytest.mark.parametrize(
    ("run_of", "sentence"),
    [
        (Run(OUT, 120, (), 0, 3.0, None, 0, planned_steps=120), "done: 120 steps, in 3 s, adapter in out/adapter"),
        (Run(OUT, 40, (), 0, 3.0, None, 0, planned_steps=120, best_step=25),
         "done: 40 steps of 120, stopped early, in 3 s, adapter of step 25, the best, in out/adapter"),
        (Run(OUT, 1200, (), 0, 9.4, None, 0, planned_steps=1200, best_step=1100),
         "done: 1,200 steps, in 9 s, adapter of step 1,100, the best, in out/adapter"),
        (Run(OUT, 7, (), 0, 1.0, None, 0), "done: 7 steps, in 1 s, adapter in out/adapter"),
    ],
)  # fmt: skip
def test_the_last_line(run_of: Run, sentence: str) -> None:
    assert run_of.ending == sentence


def test_an_early_stop_keeps_the_best_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = configuration(base_folder(tmp_path / "base"), Path("data.jsonl"))
    changes = {"early_stopping_patience": 2, "eval_steps": 1, "max_steps": 40, "lr": 0.5, "schedule": "constant"}
    del words["training"]["save_steps"]  # it follows eval_steps
    done = run(from_dict(changed(words, "training", **changes)), quiet=True)
    assert done.stopped_early
    assert done.steps < 40
    assert done.best_step == done.steps - 2
    losses = {r["step"]: r["eval_loss"] for r in done.history if "eval_loss" in r and r["step"]}
    assert min(losses, key=lambda step: losses[step]) == done.best_step
    best = load_adapter(done.folder / "checkpoints" / f"checkpoint-{done.best_step}" / "adapter")
    kept = load_adapter(done.adapter)
    for site, roles in kept.tensors.items():
        assert all(torch.equal(t, best.tensors[site][role]) for role, t in roles.items())
    assert f"adapter of step {done.best_step}, the best, in" in (done.folder / "events.log").read_text()
