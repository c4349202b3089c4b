"""One task after another: `lorary train --after`, and what stays of the earlier ones."""

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

import lorary
from lorary.errors import ConfigError, FileError
from lorary.layers.adapted import adapted_layers as layers_of
from lorary.model.loading.from_pretrained import load_model
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.config.previous_tasks import digest
from lorary.train.runner.prepare import prepare
from tests.cli.command import Command
from tests.train.resume.processes import forked
from tests.train.runs import base_folder, changed, configuration, llama

METHOD = {"name": "o-lora", "r": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def past(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tasks, the second learnt after the first."""
    folder = tmp_path_factory.mktemp("past")
    words = changed(configuration(base, folder / "data.jsonl"), "training", max_steps=2, eval_steps=2, save_steps=2)
    one, two = str(folder / "one"), str(folder / "two")
    run(from_dict(words | {"method": METHOD, "output": one}), quiet=True)
    run(from_dict(words | {"method": METHOD | {"after": f"{one}/adapter"}, "output": two}), quiet=True)
    return [f"{one}/adapter", f"{two}/adapter"]


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base, Path("data.jsonl")) | {"method": METHOD}


def test_the_next_task_holds_those_before_it_as_they_were(
    words: dict[str, Any], past: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text(yaml.safe_dump(changed(words, "training", max_steps=2, eval_steps=2, save_steps=2)))
    ran = Command(monkeypatch, capsys)("train", "my.yaml", "--quiet", "--after", past[1])
    assert (ran.code, ran.out) == (0, "out/adapter\n"), ran.err
    before, after = lorary.load_adapter(past[1]), lorary.load_adapter("out/adapter")
    assert {p.delta.past for p in after.sites} == {(3, 3)}
    mine, theirs = after.low_rank(), before.low_rank()
    for name, form in mine.items():
        B, A = form[:2]
        assert torch.equal(A[3:].sort(0).values, theirs[name][1].sort(0).values)  # the six rows of the tasks before
        assert B.shape[1] == 9
        assert A[:3].norm() > 0
        assert B[:, :3].norm() > 0
    resolved = yaml.safe_load(Path("out/config.resolved.yaml").read_text())
    assert resolved["method"]["after"] == [f"{past[1]}#{digest(before)}"]
    history = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert all(record["penalty"] > 0 for record in history if "loss" in record)


def test_a_digest_is_of_the_values_in_whatever_precision() -> None:
    digests = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)), dtype=dtype)
        digests.append(digest(lorary.Adapter.of(model)))
        model[0].params["B"].data[0, 0] = 1
        digests.append(digest(lorary.Adapter.of(model)))
    assert len(set(digests)) == 6


def test_tasks_that_stand_apart_are_listed_with_commas(words: dict[str, Any], past: list[str]) -> None:
    tree = changed(words, "method", after=f"{past[0]},{past[1]}")
    plan = prepare(from_dict(tree)).plan
    assert {p.delta.past for p in plan.sites} == {(3, 3)}  # the first is in the second, too: it counts once


class Kill(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_resumed_task_has_the_same_past_or_is_refused(words: dict[str, Any], past: list[str], tmp_path: Path) -> None:
    shutil.copytree(past[0], "mine")
    tree = changed(words, "method", after="mine", options={"hard": True})
    status, _ = forked(lambda: bool(run(from_dict(tree), quiet=True, callbacks=[Kill()])))
    assert os.WTERMSIG(status) == signal.SIGKILL
    shutil.rmtree("mine")
    shutil.copytree(past[1], "mine")
    with pytest.raises(ConfigError) as caught:
        run(from_dict(tree), resume=True, quiet=True)
    first, second = (digest(lorary.load_adapter(path)) for path in past)
    assert str(caught.value) == (
        "the folder belongs to another run:\n"
        f"  - method.after: ['{tmp_path}/mine#{first}'] in the run, ['{tmp_path}/mine#{second}'] here\n"
        "      hint: resume with the run's own configuration"
    )
    resolved = from_dict(yaml.safe_load(Path("out/config.resolved.yaml").read_text()))
    with pytest.raises(ConfigError) as caught:
        run(resolved, resume=True, quiet=True)
    assert str(caught.value) == (
        "the adapter of an earlier task has changed:\n"
        f"  - method.after: {tmp_path}/mine contains another adapter: {second}, and the configuration was made with "
        f"{first}\n      hint: write {tmp_path}/mine without a digest to take it as it is now"
    )
    shutil.rmtree("mine")
    shutil.copytree(past[0], "mine")
    assert run(resolved, resume=True, quiet=True).steps == 6
    whole = run(from_dict(tree | {"output": "whole"}), quiet=True)
    names = sorted(p.name for p in whole.adapter.iterdir() if p.name != "README.md")
    assert "lorary.json" in names
    for name in names:
        assert (whole.adapter / name).read_bytes() == Path("out/adapter", name).read_bytes(), name


def test_what_cannot_be_the_past_is_refused_before_anything_is_written(
    words: dict[str, Any], past: list[str], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(changed(words, "method", name="lora", after=past[0]))
    assert "`method.after`: `lora` cannot continue from earlier tasks\n      hint: set method.name: o-lora" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"`output`: `.*` contains the adapter of an earlier task"):
        from_dict(changed(words, "method", after=past[0]) | {"output": str(Path(past[0]).parent)})
    with pytest.raises(FileError, match="missing"):
        run(from_dict(changed(words, "method", after="missing")), quiet=True)
    model = load_model(from_dict(words).model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained("other")
    for file in base.glob("token*"):
        shutil.copy(file, "other")
    with pytest.raises(FileError) as refused:
        run(from_dict(changed(words, "method", after=past[0]) | {"model": str(tmp_path / "other")}), quiet=True)
    assert str(refused.value).startswith(
        f"an earlier task was trained on another base:\n  - {past[0]}: other weights: "
    )
    assert not Path("out/adapter").exists()
    assert layers_of(llama()) == {}
