"""A run from its configuration: the folder, what it refuses, what it writes, and how it ends."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import TrainerCallback
from typer.testing import CliRunner

import lorary
from lorary.cli import app
from lorary.errors import ConfigError, DataError, StateError, TrainingError
from lorary.train import Run, run
from lorary.train.config.load import from_dict, load
from lorary.train.runner.folder import RunFolder
from lorary.train.trainer.progress import ProgressLines
from tests.train.resume.processes import child
from tests.train.runs import WORDS, base_folder, changed, configuration


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model on disk, in bfloat16, with its tokenizer."""
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration, in the folder that it will run in."""
    monkeypatch.chdir(tmp_path)
    return configuration(base, Path("data.jsonl"))


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A finished run and its folder, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        done = run(from_dict(configuration(base, Path("data.jsonl"))), quiet=True)
        return done, done.folder.absolute()


@pytest.fixture
def out(words: dict[str, Any], finished: tuple[Run, Path]) -> Path:
    """A copy of that folder, beside its data."""
    return Path(shutil.copytree(finished[1], "out"))


def test_a_run_leaves_everything_about_itself(finished: tuple[Run, Path], out: Path, base: Path) -> None:
    done, _ = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter",
        "checkpoints",
        "config.resolved.yaml",
        "env.json",
        "events.log",
        "metrics.jsonl",
        "plots",
        "report.html",
        "run.json",
        "sample.txt",
    ]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert (done.steps, done.interrupted, done.folder, done.adapter) == (6, 0, out, out / "adapter")
    losses = [(r["step"], "eval_loss" in r) for r in done.history if "loss" in r or "eval_loss" in r]
    assert losses == [(0, True), (1, False), (2, False), (3, True), (4, False), (6, False), (6, True)]
    assert list(done.history) == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert yaml.safe_load((out / "config.resolved.yaml").read_text())["training"]["schedule"] == "cosine"
    assert json.loads((out / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert "[[" in (out / "sample.txt").read_text()
    assert (out / "plots" / "loss.svg").read_text().startswith("<svg")
    assert "done: 6 steps" in (out / "events.log").read_text()
    from transformers import AutoModelForCausalLM

    again = lorary.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out / "adapter")
    assert again(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
    assert (out / "adapter" / "tokenizer.json").is_file()


@pytest.mark.usefixtures("out")
def test_the_card_says_what_is_true_and_nothing_about_the_machine(
    words: dict[str, Any], base: Path, finished: tuple[Run, Path]
) -> None:
    done, _ = finished
    card = Path("out/README.md").read_text()
    assert card == Path("out/adapter/README.md").read_text()
    front, body = card.split("---\n")[1:]
    first, last = ([r["eval_loss"] for r in done.history if "eval_loss" in r][i] for i in (0, -1))
    metadata = yaml.safe_load(front)
    ((result,),) = [found["results"] for found in metadata.pop("model-index")]
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("loss", round(last, 4)),
        ("perplexity", round(math.exp(last), 4)),
    ]
    assert result["dataset"]["name"] == Path(words["data"]["train"]).name
    assert metadata == {
        "library_name": "peft",
        "metrics": ["loss", "perplexity"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorary", "sft"],
    }
    assert f"| held-out loss | {first:.4f} (perplexity " in body
    assert f") before training, {last:.4f} (perplexity " in body
    assert "| examples | 19, 5 held out; " in body
    assert "| steps | 6 of 4 × 1 rows, " in body
    assert "for `small`" in body
    for private in (str(base.parent), str(finished[1].parent), socket.gethostname(), "todo".upper(), "[More", "None"):
        assert private not in body
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small"


def test_weights_saved_in_16_bits_compute_in_32_where_the_cpu_has_no_other(
    words: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.model.loading.dtype._cpu_is_quick", lambda dtype: False)
    with caplog.at_level(logging.INFO, logger="lorary.train"):
        run(from_dict(changed(words, "training", max_steps=1, eval_steps=1, save_steps=1)), quiet=True)
    said = "the weights are saved in bfloat16 and compute in float32: this CPU has no bfloat16 arithmetic"
    if not torch.cuda.is_available():
        assert said in [r.getMessage() for r in caplog.records]


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused(words: dict[str, Any]) -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        run(from_dict(words), quiet=True)
    assert str(caught.value) == (
        "cannot train into 'out':\n  - output: is not empty: it holds thesis.tex\n"
        "      hint: pass --resume to continue it, --overwrite to remove it, or name another folder"
    )
    for how in ("overwrite", "resume"):
        with pytest.raises(ConfigError) as caught:
            run(from_dict(words), quiet=True, **{how: True})
        assert "holds files that lorary did not write: thesis.tex" in str(caught.value)
    assert [p.name for p in Path("out").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("out")
def test_overwriting_removes_the_run_that_was_there(words: dict[str, Any]) -> None:
    again = run(from_dict(changed(words, "training", max_steps=3)), overwrite=True, quiet=True)
    assert again.steps == 3
    assert max(r["step"] for r in again.history) == 3
    assert sorted(p.name for p in Path("out/checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("output", ["/", "~", ".", "models"])
def test_folders_that_must_not_go_are_refused(words: dict[str, Any], base: Path, output: str) -> None:
    where = str(base.parent) if output == "models" else output
    from lorary.model.loading.source import ModelSection
    from lorary.train.config.config import Config, DataSection

    config = Config(model=ModelSection(id=str(base)), data=DataSection(train=("data.jsonl",)), output=where)
    with pytest.raises(ConfigError, match="output: "):
        run(config, overwrite=True, quiet=True)
    assert (base / "config.json").is_file()
    assert Path("data.jsonl").is_file()


def test_resuming_and_overwriting_at_once_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`resume` keeps the run in the folder, `overwrite` removes it"):
        run(from_dict(words), resume=True, overwrite=True)


def test_two_runs_do_not_share_a_folder(words: dict[str, Any]) -> None:
    config = from_dict(words)
    folder = RunFolder("out")
    with (
        folder.opened(config, resume=False, overwrite=False),
        pytest.raises(StateError) as caught,
        RunFolder("out").opened(config, resume=True, overwrite=False),
    ):
        pass
    assert str(caught.value) == (
        f"the run folder is in use:\n  - out: process {os.getpid()} on {socket.gethostname()} trains here\n"
        "      hint: wait for it, or name another folder"
    )
    assert not (folder / ".lock").exists()


def test_the_lock_of_a_killed_run_is_no_obstacle_here_but_one_from_elsewhere_is(words: dict[str, Any]) -> None:
    config, lock = from_dict(words), Path("out/.lock")
    lock.parent.mkdir()
    for text in (json.dumps({"pid": 1, "host": socket.gethostname()}), '{"pid": 1, "ho', ""):
        lock.write_text(text)
        with RunFolder("out").opened(config, resume=False, overwrite=False):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not lock.exists()
    lock.write_text('{"pid": 4, "host": "another-machine"}')
    with (
        pytest.raises(StateError, match=r"process 4 on another-machine trains here\n.*remove out/\.lock"),
        RunFolder("out").opened(config, resume=False, overwrite=False),
    ):
        pass


# --- going on -------------------------------------------------------------------------------------------------------


class Kill(TrainerCallback):
    """Sends this process a signal at the end of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def _plain(history: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if not k.endswith(("runtime", "per_second"))} for r in history]


def test_a_killed_run_is_resumed_to_the_very_same_folder(words: dict[str, Any], finished: tuple[Run, Path]) -> None:
    whole, folder = finished
    pid = child(lambda: run(from_dict(words), quiet=True, callbacks=[Kill(5, signal.SIGKILL)]))
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert RunFolder("out").history()[-1]["step"] == 4
    with open("out/metrics.jsonl", "a") as file:  # what was logged after the last checkpoint, half a line of it
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    again = run(from_dict(words), resume=True, quiet=True)
    assert _plain(again.history) == _plain(whole.history)
    names = ("adapter_model.safetensors", "adapter_config.json", "lorary.json")
    for name in names:
        assert Path("out/adapter", name).read_bytes() == (folder / "adapter" / name).read_bytes()
    assert not list(Path("out").rglob(".lorary-tmp-*"))


def test_resuming_a_finished_run_changes_nothing(words: dict[str, Any]) -> None:
    """Its last step is in the middle of an epoch, where the loop has batches left."""
    config = from_dict(changed(words, "training", max_steps=3, schedule="constant"))
    first = run(config, quiet=True)
    adapter = (first.adapter / "adapter_model.safetensors").read_bytes()
    checkpoints = sorted(path.name for path in Path("out", "checkpoints").iterdir())
    for _ in range(2):
        again = run(config, resume=True, quiet=True)
        assert again.steps == first.steps == 3
        assert (again.adapter / "adapter_model.safetensors").read_bytes() == adapter
        assert sorted(path.name for path in Path("out", "checkpoints").iterdir()) == checkpoints


@pytest.mark.usefixtures("out")
def test_resuming_with_another_configuration_is_refused(words: dict[str, Any]) -> None:
    other = changed(changed(words, "training", lr=5e-4, save_total_limit=5), "method", r=8)
    with pytest.raises(ConfigError) as caught:
        run(from_dict(other), resume=True, quiet=True)
    fix = "      hint: resume with the run's own configuration"
    assert str(caught.value) == (
        "the folder belongs to another run:\n"
        f"  - method.r: 4 in the run, 8 here\n{fix}\n  - training.lr: 0.001 in the run, 0.0005 here\n{fix}"
    )


def test_resuming_before_there_is_a_checkpoint_begins_anew(
    words: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lorary.train"):
        done = run(from_dict(words), resume=True, quiet=True)
    assert done.steps == 6
    assert "no complete checkpoint to resume from: training starts from the beginning" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_command_exits_with_the_signals_code(
    words: dict[str, Any], number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:

    Path("my.yaml").write_text(yaml.safe_dump(words))

    def killed(*a: Any, **k: Any) -> Any:
        return run(*a, **k, callbacks=[Kill(2, number)])

    monkeypatch.setattr("lorary.train.runner.run.run", killed)
    ended = CliRunner().invoke(app(), ["train", "my.yaml", "--quiet"])
    assert ended.exit_code == code
    assert Path("out/checkpoints/checkpoint-3").is_dir()
    assert not Path("out/adapter").exists()
    monkeypatch.setattr("lorary.train.runner.run.run", run)
    ended = CliRunner().invoke(app(), ["train", "my.yaml", "--quiet", "--resume"])
    assert (ended.exit_code, ended.stdout) == (0, "out/adapter\n")


def test_what_stopped_a_run_is_in_its_log(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs) * float("nan")

    from lorary.train.trainer.sft import SFTTrainer

    real = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", poison)
    with pytest.raises(TrainingError, match="training stopped before optimizer step 1"):
        run(from_dict(words), quiet=True)
    assert "training stopped before optimizer step 1" in Path("out/events.log").read_text()


# --- before it starts -----------------------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_writes_nothing(words: dict[str, Any]) -> None:
    Path("my.yaml").write_text(yaml.safe_dump(words))
    before = sorted(str(p) for p in Path().rglob("*"))
    sets = ["--set", "training.epochs=2", "--set", "training.max_steps=null"]
    shown = CliRunner().invoke(app(), ["train", "my.yaml", "--dry-run", *sets])
    assert shown.exit_code == 0, shown.output
    for part in ("  lr: 0.001", "layers.{0-1}.self_attn.q_proj x2", "activations", "steps     10", "[[", "labelled"):
        assert part in shown.stdout
    assert "trust_remote_code" not in shown.stdout  # a default, as most keys are
    assert re.search(r"^# \d\d other keys keep their defaults \(--all\)$", shown.stdout, re.MULTILINE)
    every = CliRunner().invoke(app(), ["train", "my.yaml", "--dry-run", "--all", *sets]).stdout
    again = from_dict(yaml.safe_load(every.partition("\n\n")[0]))
    assert again == load("my.yaml", [sets[1], sets[3]]).resolve().with_absolute_paths()
    assert sorted(str(p) for p in Path().rglob("*")) == before


def test_data_that_would_teach_nothing_is_refused_before_anything_is_written(words: dict[str, Any]) -> None:
    rows = [{"input": "x", "prompt": "hello", "completion": ""} for _ in range(4)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError):
        run(from_dict(words), quiet=True)
    assert not Path("out").exists()


def test_steps_are_counted_as_the_trainer_counts_them(words: dict[str, Any]) -> None:
    from lorary.train.runner.prepare import prepare

    for packing in (False, True):
        tree = changed(changed(words, "data", packing=packing), "training", max_steps=None, epochs=1.5, eval_steps=1)
        assert run(from_dict(tree), overwrite=True, quiet=True).steps == prepare(from_dict(tree)).steps


def test_dpo_from_a_configuration(words: dict[str, Any]) -> None:
    rows = [{"prompt": f"{w} {i}", "chosen": " two", "rejected": " three"} for i, w in enumerate(WORDS * 2)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(from_dict(changed(words | {"task": "dpo"}, "training", lr=1e-2)), quiet=True)
    losses = [r["loss"] for r in done.history if "loss" in r]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.65
    assert "perplexity" not in Path("out/README.md").read_text()


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_in_plain_lines(words: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(from_dict(words))
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("step ")]
    assert said[0].startswith("step 0/6  held-out loss 5.")
    assert said[2].startswith("step 2/6  loss 5.")
    for part in ("  lr ", " tokens/s  ", "  eta 0:00:", "iB"):
        assert part in said[2]
    assert not [line for line in lines if "\x1b" in line]


def test_progress_as_a_bar_on_a_terminal(words: dict[str, Any]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, bar = Terminal(), ProgressLines()
    bar.stream, bar.console = stream, Console(file=stream, force_terminal=True, width=120)
    run(from_dict(words), quiet=True, callbacks=[bar])
    assert "6/6" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()
    assert bar.bar is None  # stopped, so that the terminal is as it was


def test_run_is_the_function_whatever_was_imported_before() -> None:
    """No module of the package may have its name, or its import would hide the function."""
    import importlib

    for path in Path(lorary.train.__path__[0]).rglob("*.py"):
        name = ".".join(path.relative_to(lorary.train.__path__[0]).with_suffix("").parts).removesuffix("__init__")
        importlib.import_module(f"lorary.train.{name}".rstrip("."))
    assert lorary.train.run is run
    assert callable(run)


def test_importing_the_package_brings_no_trainer() -> None:
    import subprocess

    code = "import lorary.train, sys; print([m for m in ('trl', 'transformers', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_method_that_adapts_no_layer_trains(words: dict[str, Any]) -> None:
    """There is no init that could need the plain weights."""
    done = run(from_dict(words | {"method": "full"}), quiet=True)
    assert done.steps == 6
    adapter = lorary.load_adapter(done.adapter)
    assert (adapter.sites, adapter.method.delta) == ((), None)
    assert "model.norm.weight" in adapter.full
