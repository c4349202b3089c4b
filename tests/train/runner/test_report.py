"""The report of a run: true to its numbers, on one page that fetches nothing; memory of the same thing; TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback

import lorary
from lorary.analysis.run_sections import Sample
from lorary.errors import ConfigError
from lorary.model.plan import human_bytes
from lorary.train import Run, run
from lorary.train.config.load import from_dict
from lorary.train.data.encode import encode_text
from lorary.train.runner.folder import RunFolder
from lorary.train.runner.model_card import CardData
from lorary.train.runner.report import run_report
from lorary.train.runner.samples import NEW_TOKENS, continuations
from lorary.train.trainer.step_memory import CountMemory
from tests import tiny
from tests.train import runs
from tests.train.small import tokenizer


class Stop(TrainerCallback):  # type: ignore[misc]
    """SIGTERM in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run that was stopped in its fourth step and resumed, with TensorBoard, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        tree = runs.configuration(base, Path("data.jsonl")) | {"model": {"id": str(base), "dtype": "float32"}}
        config = from_dict(runs.changed(tree, "training", report_to="tensorboard", logging_steps=1, save_steps=1))
        assert run(config, quiet=True, callbacks=[Stop(4)]).interrupted == signal.SIGTERM
        assert not Path("out/report.html").exists()
        done = run(config, quiet=True, resume=True)
        return done, done.folder.absolute()


@pytest.fixture(scope="module")
def page(finished: tuple[Run, Path]) -> str:
    return unescape((finished[1] / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_the_numbers_of_the_whole_run(finished: tuple[Run, Path], page: str) -> None:
    done, folder = finished
    losses = [record["eval_loss"] for record in done.history if "eval_loss" in record]
    assert f"{losses[0]:.2f} → {losses[-1]:.2f}" in page
    train = {r["step"]: r["loss"] for r in done.history if "loss" in r}
    assert sorted(train) == [1, 2, 3, 4, 5, 6]
    assert f"train loss from {train[1]:.3f} at step 1 to {train[6]:.3f} at step 6" in page
    assert f"held-out loss from {losses[0]:.3f} at step 0 to {losses[-1]:.3f} at step 6" in page
    assert "loss (nats per token)" in page
    for heading in ("Loss", "Optimization", "Before and after", "What was trained", "Data and training", "Memory"):
        assert f"<h2>{heading}</h2>" in page
    assert "learning rate from " in page
    assert "gradient norm from " in page
    assert f"lorary eval {folder}" in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)


def test_the_samples_are_those_of_the_base_and_of_the_adapter(
    finished: tuple[Run, Path], page: str, base: Path
) -> None:
    rows = [json.loads(line) for line in (finished[1].parent / "data.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = tokenizer()
    asked = [row for row in rows if f"<b>{texts.decode(encode_text(texts, row['prompt']))}</b>" in page]
    assert 1 <= len(asked) <= 4
    for adapter in (None, finished[1] / "adapter"):
        if adapter is not None:
            lorary.load(model, adapter)
        for row in asked:
            ids = torch.tensor([encode_text(texts, row["prompt"])])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
            answer = texts.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            shown = (
                c if c in "\n\t" or c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in answer
            )
            assert f"</b>{''.join(shown)}</pre>" in page


def test_memory_is_measured_and_predicted_of_the_same_step(finished: tuple[Run, Path], page: str) -> None:
    done, folder = finished
    assert done.step_memory is not None
    counted, predicted = done.step_memory.counted, done.step_memory.predicted
    assert counted.step == 6, "the second step after the resume"
    assert counted.batch == 4
    assert predicted == pytest.approx(counted.peak, rel=0.1)
    both = (human_bytes(counted.peak), human_bytes(predicted))
    assert f"<td>{both[0]}</td><td>{both[1]}</td>" in page
    card = (folder / "README.md").read_text()
    what = f"{both[0]} of tensors in step 6 (4 × {counted.length} tokens), {both[1]} predicted for it; "
    assert f"| memory | {what}{human_bytes(done.predicted or 0)} predicted with the longest rows |" in card


def test_the_prediction_holds_on_the_built_in_base(tmp_path: Path) -> None:
    """The card of such a run once said "77.7 MiB measured, 43.4 MiB predicted": of the process, and of tensors."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "def parse(text): return text " * n}) + "\n" for n in range(4, 12)))
    tree = {"model": {"id": "builtin:base", "dtype": "float32"}, "data": {"train": str(data), "max_length": 64}}
    done = run(
        from_dict(tree | {"training": {"max_steps": 2, "lr": 1e-4}, "output": str(tmp_path / "out")}), quiet=True
    )
    assert done.step_memory is not None
    assert done.step_memory.predicted == pytest.approx(done.step_memory.counted.peak, rel=0.06)


def test_counting_memory_changes_no_number(tmp_path: Path) -> None:
    plain, counted = runs.sft(tmp_path / "a", max_steps=3), runs.sft(tmp_path / "b", max_steps=3)
    counter = CountMemory(lambda: counted.rules.state_dict().values())
    counted.add_callback(counter)
    plain.train()
    counted.train()
    assert counter.counted is not None
    assert counter.counted.step == 2
    assert runs.trained(plain.model) == runs.trained(counted.model)
    assert runs.losses(plain) == runs.losses(counted)


def test_tensorboard_is_in_the_run_folder_and_a_resumed_run_continues_it(finished: tuple[Run, Path]) -> None:
    done, folder = finished
    assert not list((folder / "checkpoints").rglob("events.out*"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(r["step"], r["loss"]) for r in done.history if "loss" in r]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    assert [value for _, value in logged] == pytest.approx([value for _, value in expected])
    assert "watch it: tensorboard --logdir out/tensorboard" in (folder / "events.log").read_text()


def test_a_tracker_that_is_not_installed_is_told_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    tree = runs.configuration(base, Path("data.jsonl"))
    said = r'report_to: tensorboard is not installed\n      hint: pip install "lorary\[track\]"'
    with pytest.raises(ConfigError, match=said):
        run(from_dict(runs.changed(tree, "training", report_to="tensorboard")), quiet=True)
    assert not Path("out").exists()


def test_a_folder_with_tensorboards_files_is_a_run(finished: tuple[Run, Path], tmp_path: Path) -> None:
    again = RunFolder(shutil.copytree(finished[1], tmp_path / "out"))
    config = from_dict({"model": "builtin:base", "data": "builtin:topics", "output": str(again.path)})
    with again.opened(config, resume=False, overwrite=True):
        assert not (again / "tensorboard").exists()
        assert not (again / "report.html").exists()


def test_a_report_that_fails_is_told_and_does_not_fail_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("the model's own code")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorary.train.runner.report.continuations", breaks)
    tree = runs.configuration(base, Path("data.jsonl"))
    with caplog.at_level(logging.INFO, logger="lorary.train"):
        run(from_dict(runs.changed(tree, "training", max_steps=1, eval_steps=1, save_steps=1)), quiet=True)
    assert "report.html has no samples: RuntimeError: the model's own code" in caplog.text
    assert "<h2>Before and after</h2>" not in Path("out/report.html").read_text()
    assert "Traceback" in Path("out/events.log").read_text()
    monkeypatch.setattr("lorary.train.runner.report.run_report", breaks)
    with caplog.at_level(logging.INFO, logger="lorary.train"):
        done = run(from_dict(runs.changed(tree, "training", max_steps=1, eval_steps=1, save_steps=1)), overwrite=True)
    assert "no report.html: RuntimeError: the model's own code" in caplog.text
    assert done.adapter.is_dir()
    assert not Path("out/report.html").exists()


def facts(folder: Path, task: str, presets: tuple[str, ...], history: list[dict[str, Any]]) -> tuple[CardData, Any]:
    """The facts of a run that is made up, and its model."""
    model = tiny.model("LlamaForCausalLM")
    plan = lorary.plan(model, lorary.method(*presets))
    config = from_dict({"model": "org/base", "task": task, "data": {"train": "org/rows"}, "training": {"lr": 1e-4}})
    done = Run(folder, len(history), tuple(history), 0, 1.0, predicted=2**20, measured=2**21)
    return CardData(config, plan, (10, 2), 0.5, 100, done), lorary.attach(model, plan)


def test_rows_and_models_without_a_continuation_have_no_samples() -> None:
    model: Any = tiny.model("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("lora")))
    assert continuations(model, tokenizer(), [{"input_ids": [5, 6, 7], "labels": 1}]) == ()  # type: ignore[dict-item]
    (sample,) = continuations(model, tokenizer(), [{"prompt_ids": [5, 6]}])
    assert sample.expected is None
    assert continuations(tiny.model("BertForSequenceClassification"), tokenizer(), []) == ()


def test_a_preference_run_shows_its_rewards(tmp_path: Path) -> None:
    rewards = {"rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/margins": 0.75, "rewards/accuracies": 0.5}
    history = [{"step": i, "loss": 0.5, **rewards} for i in (1, 2)]
    history += [{"step": 2, "eval_loss": 0.4, "eval_rewards/accuracies": 0.9}]
    data, _ = facts(tmp_path, "dpo", ("lora",), history)
    page = unescape(run_report(tmp_path, data))
    assert "margin from 0.75 at step 1 to 0.75 at step 2" in page
    assert "held-out pairs from 0.9 at step 2" in page
    assert "<dt>Reward accuracy</dt><dd>90%" in page
    assert "loss (nats per pair)" in page
    assert "Perplexity" not in page
    plain = [{"step": 1, "loss": 0.5}]
    assert "<h2>Preferences</h2>" in page
    assert "<h2>Preferences</h2>" not in run_report(tmp_path, facts(tmp_path, "sft", ("lora",), plain)[0])


@pytest.mark.parametrize(
    ("task", "measures", "talks"),
    [("sft", True, True), ("dpo", True, True), ("classification", True, False), ("reward", False, False)],
)
def test_the_page_names_only_commands_that_work(tmp_path: Path, task: str, measures: bool, talks: bool) -> None:
    page = run_report(tmp_path, facts(tmp_path, task, ("lora",), [{"step": 1, "loss": 0.5}])[0])
    assert (f"lorary eval {tmp_path}" in page) is measures
    assert (f"lorary chat {tmp_path}" in page) is talks
    assert f"lorary merge {tmp_path}" in page


def test_adalora_shows_its_ranks(tmp_path: Path) -> None:
    data, model = facts(tmp_path, "sft", ("adalora",), [{"step": 1, "loss": 0.5}])
    page = unescape(run_report(tmp_path, data, (), lorary.Adapter.of(model)))
    assert "Rank of every layer" in page
    assert "directions remain" in page


def test_text_of_a_model_cannot_break_the_page(tmp_path: Path) -> None:
    data, _ = facts(tmp_path, "sft", ("lora",), [{"step": 1, "loss": float("nan")}])
    page = run_report(tmp_path, data, (Sample("<b>", "</pre><script>", "\x00\x1b[31m\nline", "x"),))
    assert "<script>" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    assert "\N{REPLACEMENT CHARACTER}[31m\nline" in page
