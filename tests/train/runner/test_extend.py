"""A longer run from a finished one: `lorary train --extend`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from lorary.adapters import load_adapter
from lorary.errors import ConfigError
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.trainer import checkpoint
from tests.cli.command import Command
from tests.train.runs import base_folder, changed, configuration


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three steps at a constant rate, with dropout, whose random numbers have to go on as well."""
    monkeypatch.chdir(tmp_path)
    words = changed(configuration(base, Path("data.jsonl")), "method", dropout=0.1)
    settings = {"schedule": "constant", "warmup": 0, "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
    return changed(words, "training", max_steps=3, **settings)


def equal(one: Path, other: Path) -> bool:
    """Whether two runs end with the same adapter, optimizer, random numbers and losses."""
    (a, b), (x, y) = (map(load_adapter, (one / "adapter", other / "adapter")), map(_end, (one, other)))
    tensors = (torch.equal(t, b.tensors[name][role]) for name, roles in a.tensors.items() for role, t in roles.items())
    return all(tensors) and x == y


def _end(folder: Path) -> tuple[str, list[Any]]:
    last, skipped = checkpoint.newest(folder / "checkpoints")
    assert last is not None
    assert not skipped
    tensors: dict[str, torch.Tensor] = {}
    state = checkpoint.to_json(checkpoint.read(last), tensors)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in lines if "train_loss" not in r]
    return json.dumps(state) + str({k: t.tolist() for k, t in tensors.items()}), kept


@pytest.mark.parametrize("length", [{"max_steps": 8}, {"max_steps": None, "epochs": 2}], ids=["steps", "epochs"])
def test_an_extended_run_equals_the_longer_run(words: dict[str, Any], length: dict[str, Any]) -> None:
    if "epochs" in length:
        words = changed(words, "training", max_steps=None, epochs=1)
    longer = changed(words, "training", **length)
    run(from_dict(longer | {"output": "straight"}), quiet=True)
    run(from_dict(words), quiet=True)
    assert not equal(Path("out"), Path("straight"))
    done = run(from_dict(longer), extend=True, quiet=True)
    assert done.steps == checkpoint.step_of(max(Path("straight/checkpoints").iterdir(), key=checkpoint.step_of))
    assert equal(Path("out"), Path("straight"))
    assert yaml.safe_load(Path("out/config.resolved.yaml").read_text())["training"]["max_steps"] == length["max_steps"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_an_extended_run_is_resumed_and_follows_the_schedule_of_the_longer_run(
    words: dict[str, Any], schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = changed(words, "training", schedule=schedule)
    longer = changed(words, "training", max_steps=6)
    run(from_dict(longer | {"output": "straight"}), quiet=True)
    run(from_dict(words), quiet=True)
    shutil.copytree("out", "again")
    caplog.set_level("INFO", logger="lorary.train")
    run(from_dict(longer), extend=True, quiet=True)
    rates = {
        folder: {
            r["step"]: r["learning_rate"]
            for line in Path(folder, "metrics.jsonl").read_text().splitlines()
            if "learning_rate" in (r := json.loads(line))
        }
        for folder in ("out", "straight")
    }
    assert [rates["out"][step] for step in (4, 5, 6)] == [rates["straight"][step] for step in (4, 5, 6)]
    assert rates["out"][4] > rates["out"][3]
    assert "the run is longer now: its learning rate goes on at" in caplog.text
    stopped = run(from_dict(longer | {"output": "again"}), extend=True, quiet=True, callbacks=[StopAt(5)])
    assert stopped.interrupted == signal.SIGTERM
    run(from_dict(longer | {"output": "again"}), resume=True, quiet=True)
    assert equal(Path("out"), Path("again"))


def test_a_run_that_early_stopping_has_ended_goes_on(words: dict[str, Any]) -> None:
    """At this rate nothing moves in bfloat16, so no evaluation is better than the one before."""
    words = changed(words, "training", lr=1e-12, max_steps=12, early_stopping_patience=2, save_total_limit=20)
    stopped = run(from_dict(words), quiet=True)
    assert stopped.steps < 12
    longer = changed(words, "training", max_steps=20)
    assert run(from_dict(longer), extend=True, quiet=True).steps == stopped.steps + 2  # the patience starts again


def test_adalora_goes_on_with_the_ranks_that_it_has_chosen(words: dict[str, Any]) -> None:
    words = words | {"method": {"name": "adalora", "r": 4, "options": {"target": 2, "start": 0, "final": 1}}}
    run(from_dict(words), quiet=True)
    before = {s.site.name: s.shapes["E"] for s in load_adapter("out/adapter").sites}
    assert sum(shape[0] for shape in before.values()) == 2 * len(before)
    longer = changed(words, "training", max_steps=5)
    assert run(from_dict(longer), extend=True, quiet=True).steps == 5
    assert {s.site.name: s.shapes["E"] for s in load_adapter("out/adapter").sites} == before


def test_what_cannot_be_extended_is_said(
    words: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text(yaml.safe_dump(words))
    command = Command(monkeypatch, capsys)
    for arguments, sentence in (
        (["--extend"], "output: out: holds no run with a complete checkpoint"),
        (["--extend", "--overwrite"], "`extend` keeps the run in the folder, `overwrite` removes it"),
    ):
        ran = command("train", "my.yaml", "--quiet", *arguments)
        assert ran.code != 0
        assert sentence in ran.err
    assert command("train", "my.yaml", "--quiet").code == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file() and p.name != "events.log"}
    for arguments, sentence in (
        (["--extend"], "training.max_steps: 3 is 3 steps in all, and the run has done 3"),
        (["--extend", "--set", "training.max_steps=2"], "training.max_steps: 2 is 2 steps in all"),
        (["--extend", "--set", "training.max_steps=9", "--set", "training.lr=0.1"], "training.lr: 0.001 in the run"),
        (["--resume", "--set", "training.max_steps=2"], "after --extend that is its config.resolved.yaml"),
        (["--resume", "--set", "training.max_steps=9"], "hint: pass --extend to make the run longer"),
    ):
        ran = command("train", "my.yaml", "--quiet", *arguments)
        assert ran.code != 0
        assert sentence in ran.err
    assert {p: p.read_bytes() for p in before} == before
    shutil.rmtree("out/checkpoints")
    with pytest.raises(ConfigError, match="holds no run with a complete checkpoint"):
        run(from_dict(changed(words, "training", max_steps=9)), extend=True, quiet=True)
    ran = command("train", "my.yaml", "--overwrite", "--quiet")
    assert command("train", "my.yaml", "--quiet", "--extend", "--set", "training.max_steps=4").code == 0
