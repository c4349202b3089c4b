"""A checkpoint of lorary 0.5, whose parameters, components and sites have older names, resumes.

`lorary-0.5.0` holds the checkpoint after the fourth of eight steps, written by that version, and that run's whole log.
Gradient norms and penalties of its last three steps are those of today's uninterrupted run: that version removed masked
directions from the penalty there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorary.errors import TrainingError
from lorary.train.trainer import checkpoint
from tests.train.runs import adapted, log, sft

OLD = Path(__file__).parent / "lorary-0.5.0"
SETTINGS = {"max_steps": 8, "num_train_epochs": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0}


def _trainer(folder: Path, **options: Any) -> Any:
    shutil.copytree(OLD / "checkpoint-4", folder / "checkpoint-4")
    model = adapted("adalora", target=2, start=1, final=3, targets=["q_proj", "v_proj"], **options)
    return sft(folder, model, save_strategy="steps", save_steps=4, **SETTINGS)


def _is_the_run_of_then(t: Any) -> bool:
    """Whether losses, gradient norms, rates, penalties and ranks are those of lorary 0.5."""
    before, after = json.loads((OLD / "log.json").read_text()), [r for r in log(t) if "loss" in r]
    return len(after) == 8 and all(
        {k: new[k] for k in old} == pytest.approx(old, rel=1e-3) for old, new in zip(before, after, strict=True)
    )


def test_a_checkpoint_of_an_older_version_resumes_to_its_run(tmp_path: Path) -> None:
    t = _trainer(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert _is_the_run_of_then(t)
    names = checkpoint.read(tmp_path / "checkpoint-8")["optimizer"]["state"]
    assert {name.split(".", 4)[4] for name in names} == {
        f"{site}.params.{role}" for site in ("q_proj", "v_proj") for role in "EPQ"
    }


def test_the_comparison_notices_moments_that_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    read = checkpoint.read

    def without_moments(path: Path) -> dict[str, Any]:
        state = read(path)
        return state | {"optimizer": state["optimizer"] | {"state": {}}}

    monkeypatch.setattr(checkpoint, "read", without_moments)
    t = _trainer(tmp_path)
    t.train(resume_from_checkpoint=True)
    assert not _is_the_run_of_then(t)


def test_an_older_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    t = _trainer(tmp_path)
    t.optimizer = None
    t.model.requires_grad_(False)
    next(p for n, p in t.model.named_parameters() if n.endswith("params.E")).requires_grad_(True)
    with pytest.raises(TrainingError, match="the checkpoint holds another optimizer's state"):
        t.train(resume_from_checkpoint=True)
