"""Resuming checks that the run is the same: its base, its rows, its machine; and its folder may have moved."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, TrainerCallback
from typer.testing import CliRunner

from lorary.cli import app
from lorary.errors import ConfigError, LoraryError
from lorary.train import run
from lorary.train.config.load import from_dict, load
from lorary.train.runner.folder import RunFolder
from lorary.train.runner.run_record import RunRecord
from lorary.train.trainer import checkpoint
from lorary.train.trainer.environment import changes
from tests.train.resume.processes import contents
from tests.train.runs import adapted, base_folder, changed, configuration, sft, trained


class Stop(TrainerCallback):
    """Stops the process's run as a signal does, in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), 15)


def _project(folder: Path) -> dict[str, Any]:
    """A base, training and held-out rows in a folder, and a configuration that names them relative to it."""
    base_folder(folder / "small")
    words = configuration(Path("small"), folder / "data.jsonl")
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (folder / "data.jsonl").write_text("".join(lines[4:]))
    (folder / "held.jsonl").write_text("".join(lines[:4]))
    words["data"] = {"train": "data.jsonl", "validation": "held.jsonl", "max_length": 64}
    words["training"] |= {"lr": 0.5, "eval_steps": 1, "save_steps": 1, "keep_best": True, "save_total_limit": 1}
    (folder / "my.yaml").write_text(yaml.safe_dump(words))
    return words


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run that was stopped after step 3 in `out`, and a whole one in `whole`; no test changes it."""
    folder = tmp_path_factory.mktemp("project")
    words = _project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(from_dict(words | {"output": "whole"}), quiet=True)
        assert run(from_dict(words), quiet=True, callbacks=[Stop(3)]).interrupted
    return folder


@pytest.fixture
def project(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in another place, which is the working directory."""
    folder = Path(shutil.copytree(stopped, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return folder


def _edit_config(**values: Any) -> Callable[[], None]:
    def edit() -> None:
        path = Path("small/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _other_weights() -> None:
    model = LlamaForCausalLM.from_pretrained("small")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained("small")


def _swap_lines(name: str) -> Callable[[], None]:
    return lambda: Path(name).write_text("".join(reversed(Path(name).read_text().splitlines(keepends=True))))


OTHERS: dict[str, tuple[Callable[[], None], str]] = {
    "weights": (_other_weights, "base: other weights: "),
    "eps": (
        _edit_config(rms_norm_eps=0.01),
        "base: another configuration, `rms_norm_eps`: 1e-06 when it was trained, 0.01 here",
    ),
    "activation": (
        _edit_config(hidden_act="gelu"),
        "base: another configuration, `hidden_act`: 'silu' when it was trained, 'gelu' here",
    ),
    "rope": (
        _edit_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "base: another configuration, `rope_parameters.rope_theta`: 10000.0 when it was trained, 500000.0 here",
    ),
    "held-out rows": (_swap_lines("held.jsonl"), "held_out: the held-out rows are not those of the checkpoint"),
    "training rows": (_swap_lines("data.jsonl"), "contents: the training rows are not those of the checkpoint"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_base_or_other_rows_are_refused(project: Path, other: str) -> None:
    change, expected = OTHERS[other]
    change()
    before = {p: p.read_bytes() for p in (project / "out").rglob("*") if p.is_file() and p.name != "events.log"}
    with pytest.raises(LoraryError) as caught:
        run(load("my.yaml"), resume=True, quiet=True)
    assert str(caught.value).startswith(f"this checkpoint belongs to another run:\n  - {expected}")
    after = {p: p.read_bytes() for p in (project / "out").rglob("*") if p.is_file() and p.name != "events.log"}
    assert after == before


def test_several_reasons_come_at_once(project: Path) -> None:
    _swap_lines("held.jsonl")()
    _edit_config(rms_norm_eps=0.01, hidden_act="gelu")()
    with pytest.raises(LoraryError) as caught:
        run(load("my.yaml"), resume=True, quiet=True)
    assert [problem.where for problem in caught.value.problems] == ["held_out", "base", "base"]


def test_another_machine_is_said_and_recorded(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, _ = checkpoint.newest(project / "out/checkpoints")
    assert newest is not None
    state = json.loads((newest / checkpoint.STATE).read_text())
    state["state"]["environment"]["threads"] = 7
    (newest / checkpoint.STATE).write_text(json.dumps(state))
    (newest / "MANIFEST.json").unlink()
    from lorary.files.manifest import write_manifest

    write_manifest(newest, {"step": 3})
    path = project / "out/env.json"
    began = json.loads(path.read_text()) | {"threads": 7}
    path.write_text(json.dumps(began))
    with caplog.at_level(logging.WARNING, logger="lorary.train"):
        run(load("my.yaml"), resume=True, quiet=True)
    assert "the rest of the run may differ in its last bits (threads: 7 then, 1 now)" in caplog.messages
    now = json.loads(path.read_text())
    assert {k: v for k, v in now.items() if k != "resumed"} == began
    assert [(r["step"], r["threads"]) for r in now["resumed"]] == [(3, 1)]


def test_changes_of_an_environment() -> None:
    then = {"threads": 2, "packages": {"torch": "2.12", "lorary": "0.6"}, "devices": []}
    now = {"threads": 2, "packages": {"torch": "2.13", "lorary": "0.6"}, "devices": ["H"], "matmul": "highest"}
    assert changes(then, now) == ["devices: [] then, ['H'] now", "torch: 2.12 then, 2.13 now"]
    assert changes({}, now) == changes({"packages": 3}, now) == []  # of a version that did not record it


def test_a_moved_run_is_resumed_bit_for_bit(stopped: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From elsewhere, by the configuration beside its data, into a folder of another name."""
    shutil.move("out", "renamed")
    monkeypatch.chdir("/")
    sets = [f"output={project / 'renamed'}"]
    done = run(load(project / "my.yaml", sets), resume=True, quiet=True)
    _is_the_whole_run(done.folder, stopped)
    saved = yaml.safe_load((done.folder / "config.resolved.yaml").read_text())
    assert saved["data"]["train"] == [str(project / "data.jsonl")]
    assert saved["data"]["validation"] == [str(project / "held.jsonl")]
    assert saved["model"]["id"] == str(project / "small")


def test_a_runs_own_configuration_resumes_it_wherever_it_is(
    stopped: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data and the base have stayed where they were."""
    moved = Path(shutil.move("out", project.parent / "moved"))
    monkeypatch.chdir(project.parent)
    ended = CliRunner().invoke(app(), ["train", "moved/config.resolved.yaml", "--resume", "--quiet"])
    assert (ended.exit_code, ended.stdout) == (0, "moved/adapter\n")
    _is_the_whole_run(moved, stopped)


def _is_the_whole_run(path: Path, stopped: Path) -> None:
    expected = stopped / "whole"
    names = [p.name for p in checkpoint.list_checkpoints(path / "checkpoints")]
    assert names == [p.name for p in checkpoint.list_checkpoints(expected / "checkpoints")]
    for name in names:
        assert contents(path / "checkpoints" / name) == contents(expected / "checkpoints" / name)
    for file in (expected / "adapter").iterdir():
        assert file.name == "README.md" or (path / "adapter" / file.name).read_bytes() == file.read_bytes()


def test_a_run_of_an_older_version_resumes(stopped: Path, project: Path) -> None:
    """No mark, paths as they were written, a base without settings and rows without the digest of held-out ones."""
    Path("out/run.json").unlink()
    config = Path("out/config.resolved.yaml")
    config.write_text(config.read_text().replace(f"{stopped}/", ""))
    for path in checkpoint.list_checkpoints(Path("out/checkpoints")):
        state, record = path / checkpoint.STATE, path / "adapter/lorary.json"
        values = json.loads(state.read_text())
        del values["state"]["environment"], values["state"]["data"]["held_out"]
        state.write_text(json.dumps(values))
        values = json.loads(record.read_text())
        del values["base"]["settings"]
        record.write_text(json.dumps(values))
        from lorary.files.manifest import write_manifest

        write_manifest(path, {"step": checkpoint.step_of(path)})
    done = run(load("my.yaml"), resume=True, quiet=True)
    for name in ("adapter_model.safetensors", "lorary.json"):
        assert (done.adapter / name).read_bytes() == (stopped / "whole/adapter" / name).read_bytes()
    assert RunFolder("out").finished()


# --- paths in a configuration -----------------------------------------------------------------------------------------


def test_files_are_found_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there/data.jsonl", "there/both.jsonl", "both.jsonl", "here.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "there/my.yaml").write_text(
        "model: builtin:base\ndata: {train: [data.jsonl, both.jsonl, here.jsonl, org/set], validation: none.jsonl}\n"
    )
    monkeypatch.chdir(tmp_path)
    there = load("there/my.yaml", ["data.chat_template=here.jsonl"])
    assert there.data.train == (
        str(tmp_path / "there/data.jsonl"),
        str(tmp_path / "there/both.jsonl"),
        "here.jsonl",
        "org/set",
    )
    assert (there.model.id, there.data.validation) == ("builtin:base", ("none.jsonl",))
    recorded = there.with_absolute_paths()
    assert recorded.data.train[2:] == (str(tmp_path / "here.jsonl"), "org/set")
    assert recorded.data.chat_template == str(tmp_path / "here.jsonl")
    assert recorded.with_absolute_paths() == recorded


# --- whose folder it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["resume", "overwrite"])
@pytest.mark.parametrize("mark", [None, "", "{", "[]", '{"lorary": "0.7"}', '{"state": "mine"}'])
def test_a_users_own_folder_is_never_a_run(
    project: Path, how: str, mark: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the names of a run's files, and perhaps a run.json of something else."""
    Path("mine/plots").mkdir(parents=True)
    Path("mine/README.md").write_text("my project")
    Path("mine/plots/loss.svg").write_text("my loss")
    if mark is not None:
        Path("mine/run.json").write_text(mark)
    before = {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        run(load("my.yaml", ["output=mine"]), quiet=True, **{how: True})
    held = "README.md, plots" + (", run.json" if mark is not None else "")
    assert str(caught.value) == (
        f"cannot train into 'mine':\n  - output: holds files that lorary did not write: {held}\n"
        "      hint: it has no run.json of lorary's; name another folder"
    )
    assert {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()} == before


def test_overwriting_leaves_a_users_files_in_a_run_folder(project: Path) -> None:
    shutil.move("whole", "out2")
    mine = ("notes.txt", "plots/mine.png", "adapter/model.gguf", "checkpoints/kept.txt", "wandb/mine")
    for name in mine:
        path = Path("out2", name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    done = run(load("my.yaml", ["output=out2", "training.max_steps=2"]), quiet=True, overwrite=True)
    assert done.steps == 2
    assert {Path("out2", name).read_text() for name in mine} == {"mine"}
    assert [p.name for p in checkpoint.list_checkpoints(Path("out2/checkpoints"))][-1] == "checkpoint-2"
    names = {p.name for p in Path("out2/adapter").iterdir()}
    again = run(load("my.yaml", ["output=out3", "training.max_steps=2"]), quiet=True)
    assert names - {"model.gguf"} == {p.name for p in again.adapter.iterdir()}  # nothing of the old run is left


@pytest.mark.parametrize("name", [".", "./", "", "notes.txt", "../x", "adapter/../..", "/etc", "adapter/a\0b", 5])
def test_a_record_names_only_files_in_the_runs_own_folders(tmp_path: Path, name: Any) -> None:
    mark = asdict(RunRecord(files=("adapter/tokenizer.json",)))
    (tmp_path / "run.json").write_text(json.dumps(mark))
    assert RunRecord.read(tmp_path) is not None
    (tmp_path / "run.json").write_text(json.dumps(mark | {"files": [name]}))
    assert RunRecord.read(tmp_path) is None


def test_a_clearing_that_is_killed_can_be_repeated(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorary.train.runner import folder

    def killed(path: Path) -> None:
        if path.name == "env.json":
            raise KeyboardInterrupt
        remove(path)

    remove = folder.remove
    with monkeypatch.context() as patch:
        patch.setattr(folder, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            run(load("my.yaml", ["output=whole"]), quiet=True, overwrite=True)
    assert not RunFolder("whole").finished()
    assert checkpoint.list_checkpoints(Path("whole/checkpoints")) == []
    with RunFolder("whole").opened(load("my.yaml"), resume=False, overwrite=True):
        assert sorted(p.name for p in Path("whole").iterdir()) == [".lock", ".lock.held", "run.json"]


# --- another rank -----------------------------------------------------------------------------------------------------


def test_resumed_into_a_fresh_model_it_is_not_wrapped_twice(tmp_path: Path) -> None:
    """Four steps, a checkpoint, four more, against eight; and a model of another rank is refused."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = sft(tmp_path / "whole", adapted(dropout=0.2), **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "again/checkpoint-4")
    again = sft(tmp_path / "again", adapted(dropout=0.2), **settings)
    again.train(resume_from_checkpoint=True)
    assert trained(again.model) == trained(whole.model)
    assert [n for n, _ in again.model.named_modules()] == [n for n, _ in whole.model.named_modules()]
    assert contents(tmp_path / "again/checkpoint-8") == contents(tmp_path / "whole/checkpoint-8")
    with pytest.raises(LoraryError, match=r"the checkpoint holds another adapter:\n.*'A': .4, 64., .*'A': .8, 64."):
        sft(tmp_path / "again", adapted(r=8), **settings).train(resume_from_checkpoint=True)


def test_another_rank_in_the_configuration_is_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"the folder belongs to another run:\n  - method.r: 4 in the run, 8 here"):
        run(from_dict(changed(yaml.safe_load(Path("my.yaml").read_text()), "method", r=8)), resume=True, quiet=True)


def test_checkpoints_of_an_abandoned_future_go_first(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    removed = checkpoint.rotate(tmp_path, 2, None, 6)
    assert [p.name for p in removed] == ["checkpoint-8", "checkpoint-10"]
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
