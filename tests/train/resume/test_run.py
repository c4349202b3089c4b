"""A run that was killed goes on bit for bit; and the same comparison fails where something is not restored."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from lorary.errors import FileError, TrainingError
from lorary.train.trainer import checkpoint, resume, rng
from lorary.train.trainer.mixin import AdapterTraining
from tests.train.resume.processes import forked
from tests.train.runs import adapted, log, rows, sft, trained

# Dropout in the model and in the adapters, shuffling, accumulation, a schedule, a log line over several steps that no
# checkpoint is aligned with, and evaluations: whatever a resumption could forget.
SETTINGS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 4,
}


def _run(
    folder: Path,
    *,
    stop: int = 0,
    with_signal: int = 0,
    resume: bool | str = False,
    **settings: Any,
) -> Any:
    """Trains 12 steps, 6 in an epoch. `stop`: sends itself a signal at the end of that step."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                os.kill(os.getpid(), with_signal)

    model = adapted("lora", "lora+", dropout=0.2, attention_dropout=0.2, targets=["all-linear", "lm_head"])
    t = sft(folder, model, held_out=rows(4), **(SETTINGS | settings))
    t.add_callback(Stop())
    t.train(resume_from_checkpoint=resume)
    return t


def _result(t: Any) -> dict[str, Any]:
    return {"adapter": trained(t.model), "log": log(t), "tokens": t._total_train_tokens}


pytestmark = pytest.mark.xdist_group("resume")  # one process: the fixture is a whole run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    status, result = forked(lambda: _result(_run(folder)))
    assert status == 0
    return result


@pytest.fixture(scope="module")
def killed_at_9(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves behind that was killed at the end of step 9; each test goes on with a copy."""
    folder = tmp_path_factory.mktemp("killed")
    status, _ = forked(lambda: _run(folder, stop=9, with_signal=signal.SIGKILL))
    assert os.WTERMSIG(status) == signal.SIGKILL
    return folder


@pytest.mark.parametrize(("killed", "after"), [(2, 1), (6, 5), (7, 6), (10, 9)])
def test_killed_in_the_middle_and_resumed_it_is_the_same_run(
    tmp_path: Path, uninterrupted: Any, killed: int, after: int
) -> None:
    """SIGKILL at the end of step `killed`, before its checkpoint: step `after` was the last one saved.

    6 is the end of an epoch, so a run resumes before, at and behind it.
    """
    status, _ = forked(lambda: _run(tmp_path, stop=killed, with_signal=signal.SIGKILL))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoint.newest(tmp_path)[0] == tmp_path / f"checkpoint-{after}"
    status, resumed = forked(lambda: _result(_run(tmp_path, resume=True)))
    assert status == 0
    assert resumed == uninterrupted


def _forget(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Restores everything but one thing."""
    real = AdapterTraining._load_from_checkpoint
    if what == "random numbers":
        monkeypatch.setattr(rng, "restore", lambda state: None)
    elif what == "place in the epoch":
        monkeypatch.setattr(AdapterTraining, "start_epoch", lambda self, epoch: None)
        monkeypatch.setattr("transformers.trainer.skip_first_batches", lambda loader, count: loader)
    elif what == "order of the rows":
        monkeypatch.setattr("lorary.train.data.sampler.SeededSampler.set_epoch", lambda self, epoch: None)
    elif what == "adapter":
        monkeypatch.setattr(resume, "load_into", lambda model, adapter: None)
    elif what == "schedule":
        monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda self, state: None)
    else:

        def load(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            if what == "optimizer":
                self._resumed["optimizer"]["state"] = {}
            else:
                self._resumed["log"]["loss"] = 0.0

        monkeypatch.setattr(AdapterTraining, "_load_from_checkpoint", load)


FORGOTTEN = ("random numbers", "place in the epoch", "order of the rows", "adapter", "optimizer", "schedule", "log")


@pytest.mark.parametrize("what", FORGOTTEN)
def test_the_comparison_notices_whatever_is_forgotten(
    tmp_path: Path, uninterrupted: Any, killed_at_9: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the very same test, with one thing not restored, must not find the runs equal."""
    shutil.copytree(killed_at_9, tmp_path, dirs_exist_ok=True)
    _forget(monkeypatch, what)
    status, resumed = forked(lambda: _result(_run(tmp_path, resume=True)))
    assert status == 0
    assert resumed != uninterrupted
    if what == "log":
        assert resumed["adapter"] == uninterrupted["adapter"]  # only the next line of the log is another
    else:
        assert resumed["adapter"] != uninterrupted["adapter"]


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    tmp_path: Path, uninterrupted: Any, killed_at_9: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(killed_at_9, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoint-8" / checkpoint.TENSORS
    newest.write_bytes(newest.read_bytes()[:-7])
    with caplog.at_level("INFO", logger="lorary.train"):
        result = _result(_run(tmp_path, resume=True))
    assert result == uninterrupted
    said = [r.getMessage() for r in caplog.records]
    assert said[0].startswith("passed over checkpoint-8, which is incomplete or damaged (")
    assert said[1] == "resuming from checkpoint-7"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path: Path, uninterrupted: Any, number: int) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    t = _run(tmp_path, stop=3, with_signal=number, save_strategy="no")
    assert t.guard.stop == number
    assert t.state.global_step == 4  # the signal came at the end of step 3; step 4 is finished and saved
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert _result(_run(tmp_path, resume=True))["adapter"] == uninterrupted["adapter"]


def test_asked_twice_it_leaves_at_once(tmp_path: Path) -> None:
    class Twice(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

    def work() -> None:
        t = sft(tmp_path, save_strategy="no")
        t.add_callback(Twice())
        t.train()

    start = time.monotonic()
    status, _ = forked(work)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert time.monotonic() - start < 30
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_resumes_to_itself(tmp_path: Path, uninterrupted: Any) -> None:
    _run(tmp_path)
    again = _run(tmp_path, resume=True)
    assert again.state.global_step == 12
    assert trained(again.model) == uninterrupted["adapter"]


def test_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    def run(folder: Path, steps: int, resume: bool) -> Any:
        words = {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        # so small a rate that no evaluation is better than the one before by 0.1
        t = sft(folder, adapted(), held_out=rows(4), **(SETTINGS | words), learning_rate=1e-6, max_steps=steps)
        t.add_callback(EarlyStoppingCallback(early_stopping_patience=4, early_stopping_threshold=0.1))
        t.train(resume_from_checkpoint=resume)
        return t

    assert run(tmp_path / "whole", 12, False).state.global_step == 5  # the first is the best, and four follow
    run(tmp_path / "two", 3, False)
    assert run(tmp_path / "two", 12, True).state.global_step == 5


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    t = sft(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    t.train()
    with pytest.raises(TrainingError) as caught:
        sft(tmp_path, train=rows(21), per_device_train_batch_size=1, seed=5).train(resume_from_checkpoint=True)
    assert str(caught.value) == (
        "this checkpoint belongs to another run:\n"
        "  - rows: 23 in the checkpoint, 21 here\n"
        "  - seed: 42 in the checkpoint, 5 here\n"
        "  - batch_size: 2 in the checkpoint, 1 here\n"
        "  - contents: the training rows are not those of the checkpoint\n"
        "      hint: restore the run's original data, or start again"
    )
    with pytest.raises(TrainingError, match="contents: the training rows are not"):  # as many, and others
        sft(tmp_path, train=rows(masked=2)).train(resume_from_checkpoint=True)
    with pytest.raises(FileError, match="the checkpoint holds another adapter"):
        sft(tmp_path, adapted(targets=["q_proj"])).train(resume_from_checkpoint=True)


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    for wanted in (True, str(tmp_path / "checkpoint-7")):
        with pytest.raises(FileError) as caught:
            sft(tmp_path).train(resume_from_checkpoint=wanted)
        where = str(tmp_path) if wanted is True else wanted
        assert str(caught.value) == (
            f"cannot resume this run:\n  - {where}: holds no complete checkpoint\n      hint: start without resuming"
        )
