"""lorary eval: the run's own numbers, several models side by side, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorary
from lorary.analysis.evaluation import evaluate
from lorary.train import run
from lorary.train.config.load import from_dict, load
from lorary.train.data.load import load as load_data
from lorary.train.data.tokenize import tokenize
from tests.cli.command import Command
from tests.train import tasks
from tests.train.runs import base_folder, changed, configuration
from tests.train.small import tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and a finished run of them."""
    where = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        base_folder(Path("base"))
        tree = configuration(where / "base", where / "data.jsonl") | {"output": str(where / "out")}
        tree["model"] = {"id": str(where / "base"), "dtype": "float32"}
        run(from_dict(changed(tree, "training", lr=1e-2)), quiet=True)
    return where


@pytest.fixture
def folder(trained: Path, command: Command) -> Path:
    """The same, copied to the folder of the test; the run's paths are those of the original."""
    assert command
    for name in ("base", "out", "data.jsonl"):
        (shutil.copytree if (trained / name).is_dir() else shutil.copy)(trained / name, name)  # type: ignore[operator]
    return trained


def results(command: Command, *arguments: str) -> list[dict[str, Any]]:
    ran = command("eval", *arguments, "--json")
    assert ran.code == 0, ran.err
    found: list[dict[str, Any]] = json.loads(ran.out)["results"]
    return found


def test_a_run_has_the_loss_that_it_logged(command: Command, folder: Path) -> None:
    history = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    base, out = results(command, str(folder / "base"), "out")
    assert (base["model"], out["model"]) == (str(folder / "base"), "out")
    assert base["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert out["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert out["perplexity"] == pytest.approx(math.exp(losses[-1]), rel=1e-6)
    assert out["rows"] == base["rows"] == 5
    # with the adapter in its own folder, and in other batches: the same rows, the same number
    again = results(command, "out/adapter", "-b", "2")
    assert again[0]["loss"] == pytest.approx(out["loss"], rel=1e-6)


def test_the_numbers_are_those_of_the_models(command: Command, folder: Path) -> None:
    """Directly: the rows as training reads them, and Transformers' model with the adapter on it."""
    config = load("out/config.resolved.yaml")
    held_out = tokenize(load_data(config.data, seed=config.training.seed).validation, tokenizer(), config.data).rows
    model = lorary.load(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), "out/adapter")
    (out,) = results(command, "out")
    expected = evaluate(model, held_out)
    assert (out["loss"], out["token_accuracy"]) == (expected.loss, expected.accuracy)


def test_adapter_and_merged_model_side_by_side(command: Command, folder: Path) -> None:
    assert command("merge", "out", "merged", "--dtype", "float32").code == 0
    for data in (("--data", "data.jsonl", "--format", "prompt-completion"), ("--config", "out/config.resolved.yaml")):
        found = results(command, "out", "merged", "--dtype", "float32", *data)
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
        assert found[0]["rows"] == (24 if "--data" in data else 5)
    ran = command("eval", "base", "out", "--data", "data.jsonl", "--limit", "6", "--set", "data.loss=all")
    assert ran.code == 0
    assert ran.err == ""
    table = [line.split() for line in ran.out.splitlines()]
    assert ["data.jsonl"] in table
    assert [words[1] for words in table if words[:1] == ["│"]] == ["base", "out"]
    assert "loss in nats per labelled token" in ran.out


def test_rows_are_shortened_to_the_context_of_the_model(command: Command, folder: Path) -> None:
    Path("text.jsonl").write_text(json.dumps({"text": "hello world " * 40}) + "\n")
    (one,) = results(command, "out", "--data", "text.jsonl")
    (several,) = results(command, "out", "--data", "text.jsonl", "--max-length", "16")
    assert one["rows"] == 1 < several["rows"]


def refusal(command: Command, *arguments: str) -> str:
    ran = command("eval", *arguments)
    assert (ran.code != 0, ran.out) == (True, "")
    return ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("base",),
            "none of the models is a run, whose held-out rows would be taken\n      hint: name some with --data",
        ),
        (("out", "--data", "x.jsonl", "--config", "y.yaml"), "--data: names the rows, and so does --config"),
        (("out", "--dtype", "floaty32"), "--dtype floaty32: is unknown\n      hint: did you mean `float32`"),
        (
            ("out", "--tasks", "x", "--data", "data.jsonl"),
            "--tasks: bring their own data\n      hint: leave out --data",
        ),
        (("out", "--tasks", " , "), "--tasks: names no task\n      hint: such as --tasks hellaswag"),
        (("out", "--task-folder", "x"), "--task-folder: has no effect without --tasks"),
        (("./nowhere", "./there"), "./nowhere: there is no such folder\n  - ./there: there is no such folder"),
        (("out", "--data", "pairs.jsonl"), "pairs.jsonl: are preference pairs, and eval measures the loss per token"),
        (("out", "--data", "data.jsonl", "--format", "alpacca"), "`format` must be"),
        (("out", "--data", "nothing.jsonl"), "there is no such file or folder"),
        (("out", "--config", "none.yaml"), "none.yaml holds no rows out\n      hint: name some with --data"),
        (("out", "--set", "data.max_len=3", "--data", "data.jsonl"), "max_len"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_reason(
    command: Command, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("none.yaml").write_text("model: base\ndata: data.jsonl\n")
    assert said in refusal(command, *arguments)


def test_without_the_harness_the_extra_is_named(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    assert 'hint: pip install "lorary[eval]"' in refusal(command, "out", "--tasks", "hellaswag")


def test_tasks_of_the_harness_on_an_adapter(command: Command, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    Path("tasks").mkdir()
    Path("rows.json").write_text(json.dumps([{"question": "hello", "label": i % 2} for i in range(6)]))
    task = {
        "task": "two_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(Path("rows.json").absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": [" two", " three"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    Path("tasks/two.yaml").write_text(json.dumps(task))
    ran = command("eval", "base", "out", "--tasks", "two_words", "--task-folder", "tasks", "--json")
    assert ran.code == 0, ran.err
    assert {name: found["two_words"]["acc,none"] for name, found in json.loads(ran.out).items()} == {
        "base": 0.5,
        "out": 0.5,
    }
    assert "did you mean `two_words`?" in refusal(command, "out", "--tasks", "two_wrds", "--task-folder", "tasks")


# --- classifiers ------------------------------------------------------------------------------------------------------


def test_a_classifier_has_the_figures_that_it_logged(command: Command, tmp_path: Path) -> None:
    assert command
    base = tasks.saved(tmp_path, "BertForMaskedLM")
    words = tasks.settings(tmp_path, "classification", base, tasks.LABELLED, lr=1e-2, max_steps=8)
    words["data"]["validation_split"] = 0.25
    done = tasks.train(words)
    last = next(record for record in reversed(done.history) if "eval_loss" in record)
    [out] = results(command, "out", "-b", "4")
    expected = {key: last[f"eval_{key}"] for key in ("loss", "accuracy", "macro_f1")}
    assert {key: out[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert (out["model"], out["rows"]) == ("out", 4)
    assert command("merge", "out", "merged").code == 0
    # the merged model on rows of a file, and the table
    both = results(command, "out", "merged", "--data", "rows.jsonl")
    assert both[0]["loss"] == pytest.approx(both[1]["loss"], rel=1e-4)
    assert both[1]["rows"] == len(tasks.LABELLED)
    shown = command("eval", "merged", "--data", "rows.jsonl")
    assert "macro f1" in shown.out
    assert "the loss of the labels per row" in shown.out

    tasks.rows(tmp_path, [{"text": "a book", "label": label} for label in ("good", "dull", "odd")], "other")
    tasks.rows(tmp_path, [{"text": "a book", "label": 0.5}], "numbers")
    tasks.rows(tmp_path, tasks.PAIRS, "pairs")
    for arguments, said in (
        (("out", "--data", "other.jsonl"), "other.jsonl:2: the label `dull` is not one of the model's: bad, good"),
        (("out", "--data", "other.jsonl"), "other.jsonl:3: the label `odd` is not one of"),
        (
            ("out", "--data", "numbers.jsonl"),
            "`label` is 0.5, and the model was trained for single label classification",
        ),
        (("out", "--data", "pairs.jsonl"), "are preference pairs, and eval measures classifiers on labelled texts"),
        (
            ("out", "builtin:base"),
            "these models cannot be compared:\n  - out: is a classifier\n  - builtin:base: is no",
        ),
        (
            ("builtin:base", "--data", "rows.jsonl"),
            "rows.jsonl: are labelled texts, and eval measures the loss per token",
        ),
    ):
        assert said in refusal(command, *arguments)


def test_a_decoder_that_classifies_is_measured_as_it_was_trained(command: Command, tmp_path: Path) -> None:
    """Training finds the last token of a row by the tokenizer's padding, which its configuration does not name."""
    assert command
    base = tasks.saved(tmp_path, "LlamaForCausalLM", pad_token_id=None, eos_token_id=7)
    texts = [f"a {'fine' if i % 2 else 'poor'} book" + " of words" * (i % 4) for i in range(16)]
    rows = [{"text": text, "label": "good" if "fine" in text else "bad"} for text in texts]
    words = tasks.settings(tmp_path, "classification", base, rows, lr=1e-2)
    words["data"]["validation_split"] = 0.5
    done = tasks.train(words)
    last = next(record for record in reversed(done.history) if "eval_loss" in record)
    [out] = results(command, "out", "-b", "8")
    assert out["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)


def test_a_number_is_compared_with_the_numbers_of_the_rows(command: Command, tmp_path: Path) -> None:
    assert command
    tasks.saved(tmp_path, "BertForSequenceClassification", num_labels=1)
    tasks.rows(tmp_path, [{"text": "a book", "label": 0.5}, {"text": "two books", "label": 2}], "numbers")
    [found] = results(command, "BertForSequenceClassification", "--data", "numbers.jsonl")
    assert set(found) == {"model", "loss", "mean_absolute_error", "rows"}
    tasks.rows(tmp_path, [{"text": "a book", "label": "good"}], "words")
    said = refusal(command, "BertForSequenceClassification", "--data", "words.jsonl")
    assert "words.jsonl:1: `label` is 'good', and the model predicts a number" in said
