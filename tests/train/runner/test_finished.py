"""A run that is over: resumed it takes no step, changes no file, and completes what a kill has left undone."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import EarlyStoppingCallback, TrainerCallback
from typer.testing import CliRunner

from lorary.cli import app
from lorary.errors import FileError
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.folder import RunFolder
from lorary.train.trainer import checkpoint
from tests.train.resume.processes import child
from tests.train.runs import adapted, base_folder, changed, configuration, rows, sft, trained

EARLY = {"max_steps": 12, "lr": 1e-6, "eval_steps": 1, "early_stopping_patience": 2, "save_steps": 3}
ENDS = {
    "constant": {"schedule": "constant", "max_steps": 3},
    "early stopping": EARLY,
    "best": {"lr": 0.5, "eval_steps": 1, "save_steps": 1, "keep_best": True, "save_total_limit": 1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base, Path("data.jsonl"))


class At(TrainerCallback):
    """Does something at an event of a step, and counts the steps."""

    def __init__(self, event: str = "", step: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.steps, self.step, self.act = 0, step, act
        if event:
            setattr(self, event, self._at)

    def _at(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps += 1


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _untouched(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(path.rglob("*")) if p.is_file()}


def _result(path: Path) -> dict[str, Any]:
    """What does not depend on the time: adapter, pictures, metrics, checkpoints by name."""
    files = [p for folder in ("adapter", "plots") for p in (path / folder).iterdir() if p.name != "README.md"]
    records = [
        {k: v for k, v in r.items() if not k.endswith(("runtime", "per_second"))} for r in RunFolder(path).history()
    ]
    names = [p.name for p in checkpoint.list_checkpoints(path / "checkpoints")]
    return {p.name: p.read_bytes() for p in files} | {"records": records, "checkpoints": names}


@pytest.mark.parametrize("end", ENDS)
def test_resumed_it_says_so_and_every_file_stays(
    words: dict[str, Any], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    tree = changed(words, "training", **ENDS[end])
    first = run(from_dict(tree), quiet=True)
    before, steps = _untouched(Path("out")), At()
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lorary.train"):
            again = run(from_dict(tree), resume=True, quiet=True, callbacks=[steps])
        assert (again.steps, again.interrupted, again.history) == (first.steps, 0, first.history)
        assert _untouched(Path("out")) == before
    why = "early stopping ended it at step 4 of 12" if end == "early stopping" else f"all {first.steps} steps are done"
    said = f"this run is finished ({why}): nothing to resume, its adapter is in out/adapter"
    assert caplog.messages[-1] == said
    assert steps.steps == 0


def test_the_command_ends_well(words: dict[str, Any]) -> None:
    Path("my.yaml").write_text(yaml.safe_dump(changed(words, "training", max_steps=2)))
    assert CliRunner().invoke(app(), ["train", "my.yaml", "--quiet"]).exit_code == 0
    before = _untouched(Path("out"))
    shutil.rmtree("out/checkpoints")  # to save room: it is finished all the same
    ended = CliRunner().invoke(app(), ["train", "my.yaml", "--resume"])
    assert (ended.exit_code, ended.stdout) == (0, "out/adapter\n")
    assert "this run is finished (all 2 steps are done)" in ended.stderr
    assert _untouched(Path("out")) == {k: v for k, v in before.items() if "checkpoints" not in k}


def test_a_signal_in_the_last_step_finds_nothing_to_stop(words: dict[str, Any]) -> None:
    whole = run(from_dict(words | {"output": "whole"}), quiet=True)
    last = At("on_step_begin", 5, _signal(signal.SIGTERM))
    done = run(from_dict(words), quiet=True, callbacks=[last])
    assert (done.steps, done.interrupted) == (6, 0)
    assert _result(done.folder) == _result(whole.folder)


@pytest.mark.parametrize(("event", "end"), [("on_save", "best"), ("on_train_end", "constant")])
def test_killed_after_the_last_step_it_is_completed_without_another(
    words: dict[str, Any], event: str, end: str
) -> None:
    tree = changed(words, "training", **ENDS[end])
    whole = run(from_dict(tree | {"output": "whole"}), quiet=True)
    kill = At(event, whole.steps, _signal(signal.SIGKILL))
    pid = child(lambda: run(from_dict(tree), quiet=True, callbacks=[kill]))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not Path("out/adapter").exists()
    steps = At()
    done = run(from_dict(tree), quiet=True, resume=True, callbacks=[steps])
    assert (steps.steps, done.steps) == (0, whole.steps)
    assert _result(done.folder) == _result(whole.folder)
    assert RunFolder("out").finished() == RunFolder("whole").finished()


def test_a_full_disk_in_the_last_picture_costs_no_step(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(from_dict(words | {"output": "whole"}), quiet=True)
    real = RunFolder.write

    def full(self: RunFolder, name: str, text: str) -> None:
        if name.startswith("plots"):
            raise FileError("cannot write", []) from OSError(errno.ENOSPC, "no space")
        real(self, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", full)
        with pytest.raises(FileError):
            run(from_dict(words), quiet=True)
    steps = At()
    run(from_dict(words), quiet=True, resume=True, callbacks=[steps])
    assert steps.steps == 0
    assert _result(Path("out")) == _result(whole.folder)


def test_a_run_of_an_older_version_is_finished_too(words: dict[str, Any]) -> None:
    run(from_dict(words), quiet=True)
    Path("out/run.json").unlink()
    before = _untouched(Path("out"))
    assert run(from_dict(words), quiet=True, resume=True).steps == 6
    assert _untouched(Path("out")) == before


def test_another_configuration_is_no_finished_run(words: dict[str, Any]) -> None:
    run(from_dict(words), quiet=True)
    with pytest.raises(
        ValueError, match=r"the folder belongs to another run:\n  - training.max_steps: 6 in the run, 9"
    ):
        run(from_dict(changed(words, "training", max_steps=9)), quiet=True, resume=True)


# --- in a trainer of one's own ----------------------------------------------------------------------------------------


def _early(folder: Path, patience: int = 4, **settings: Any) -> Any:
    words = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 1e-6}
    t = sft(folder, adapted(), held_out=rows(4), **(words | best | settings))
    t.add_callback(EarlyStoppingCallback(patience, early_stopping_threshold=0.1))  # no evaluation is that much better
    return t


def test_early_stopping_is_the_end_in_every_trainer(tmp_path: Path) -> None:
    t = _early(tmp_path)
    t.train()
    assert t.state.global_step == 5
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-5"  # no multiple of save_steps
    for _ in range(2):
        again, steps = _early(tmp_path), At()
        again.add_callback(steps)
        again.train(resume_from_checkpoint=True)
        assert (again.state.global_step, steps.steps) == (5, 0)


def test_a_callback_that_stops_a_run_does_not_end_it(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 4

    t = _early(tmp_path, patience=12)
    t.add_callback(Stop())
    t.train()
    assert t.state.global_step == 4
    again = _early(tmp_path, patience=12)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12


def test_with_a_limit_of_one_the_last_checkpoint_stays_beside_the_best(tmp_path: Path) -> None:
    t = _early(tmp_path, save_steps=1, save_total_limit=1, learning_rate=1.0)
    t.train()
    assert t.args.save_total_limit == 1
    steps = [t.state.best_global_step, t.state.global_step]
    assert steps[0] < steps[1]
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == steps


def test_a_checkpoint_names_no_folder(tmp_path: Path) -> None:
    """The best one is known by its step, so that they may be moved."""
    t = _early(tmp_path / "here", save_steps=1, learning_rate=1.0)
    t.train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    newest, _ = checkpoint.newest(tmp_path / "there")
    assert newest is not None
    assert json.loads((newest / checkpoint.TRAINER_STATE).read_text())["best_model_checkpoint"] is None
    assert not [p for p in newest.rglob("*") if p.is_file() and str(tmp_path).encode() in p.read_bytes()]
    again = _early(tmp_path / "there", save_steps=1, learning_rate=1.0)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / f"there/checkpoint-{t.state.best_global_step}")
    assert trained(again.model) == trained(t.model)


# --- evaluations by epoch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("save", "step"), [("steps", 5), ("steps", 6), ("epoch", 7)])
def test_a_stop_in_an_epoch_of_evaluations_leaves_no_trace(tmp_path: Path, save: str, step: int) -> None:
    """A signal neither evaluates an unfinished epoch, nor loses the evaluation of a finished one (6 steps each)."""

    def log(folder: Path, *callbacks: At, resume: bool = False) -> list[dict[str, Any]]:
        t = sft(folder, adapted(), held_out=rows(4), eval_strategy="epoch", save_strategy=save, save_steps=1)
        for callback in callbacks:
            t.add_callback(callback)
        t.train(resume_from_checkpoint=resume)
        return [{k: v for k, v in r.items() if not k.endswith(("runtime", "per_second"))} for r in t.state.log_history]

    whole = log(tmp_path / "whole")
    assert [r["step"] for r in whole if "eval_loss" in r] == [6, 12]
    log(tmp_path / "again", At("on_step_begin", step - 1, _signal(signal.SIGTERM)))
    assert log(tmp_path / "again", resume=True)[:-1] == whole[:-1]


def test_a_kill_before_the_evaluation_of_an_epoch_does_not_lose_it(tmp_path: Path) -> None:
    def train(folder: Path, *callbacks: At, resume: bool = False) -> Any:
        t = sft(folder, adapted(), held_out=rows(4), eval_strategy="epoch", save_strategy="steps", save_steps=1)
        for callback in callbacks:
            t.add_callback(callback)
        t.train(resume_from_checkpoint=resume)
        return t

    pid = child(lambda: train(tmp_path, At("on_epoch_end", 6, _signal(signal.SIGKILL))))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-5"
    resumed = train(tmp_path, resume=True)
    assert [r["step"] for r in resumed.state.log_history if "eval_loss" in r] == [6, 12]
