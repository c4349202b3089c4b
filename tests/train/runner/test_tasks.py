"""Every task of `lorary train`: it learns, resumes bit for bit, and says what it made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import lorary
from lorary.cli.merge import merge
from lorary.errors import ConfigError, DataError, LoraryError, TrainingError
from lorary.train.config.load import from_dict
from lorary.train.runner.prepare import prepare
from lorary.train.trainer.reward_function import load_reward
from tests.train.tasks import JUDGED, LABELLED, PAIRS, PROMPTS, REWARDS, figures, saved, settings, tensors, train


def config_of(task: str, folder: Path) -> dict[str, Any]:
    if task == "classification":
        config = settings(folder, task, saved(folder, "BertForMaskedLM"), LABELLED, lr=1e-2)
        config["data"]["validation_split"] = 0.25
        return config
    if task == "grpo":
        (folder / "rewards.py").write_text(REWARDS)
        reward = {"reward": f"{folder / 'rewards.py'}:spaces", "num_generations": 4, "max_completion_length": 8}
        return settings(folder, task, "builtin:base", PROMPTS, lr=1e-3, grpo_beta=0.01, **reward)
    values = {"kto": JUDGED, "reward": PAIRS}[task]
    config = settings(folder, task, "builtin:base", values, lr=1e-3)
    config["data"]["validation_split"] = 0.25
    return config


def _undo_last_steps(out: Path) -> None:
    """A run folder as if the run had been killed after its second step."""
    for name in ("checkpoints/checkpoint-4", "adapter"):
        shutil.rmtree(out / name)


@pytest.mark.parametrize("task", ["classification", "kto", "reward", "grpo"])
def test_a_task_resumes_bit_for_bit(task: str, tmp_path: Path) -> None:
    config = config_of(task, tmp_path)
    whole = train(config)
    history, adapter = figures(whole), tensors(whole)
    assert whole.steps == 4
    _undo_last_steps(tmp_path / "out")
    again = train(config, resume=True)
    assert figures(again) == history
    assert tensors(again) == adapter
    if task in ("kto", "reward"):
        losses = [r["eval_loss"] for r in history if "eval_loss" in r]
        assert losses[-1] < losses[0]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"- {task}\n" in card
    if task == "grpo":
        _undo_last_steps(tmp_path / "out")
        (tmp_path / "rewards.py").write_text(REWARDS + "# another\n")
        with pytest.raises(TrainingError, match=r"reward function: .* in the checkpoint, .* here"):
            train(config, resume=True)


def test_a_classifier_learns_and_its_adapter_holds_the_new_head(tmp_path: Path) -> None:
    config = config_of("classification", tmp_path) | {"training": {"max_steps": 30, "lr": 1e-2, "seed": 3}}
    done = train(config)
    last = next(r for r in reversed(done.history) if "eval_accuracy" in r)
    assert last["eval_accuracy"] == 1.0
    assert last["eval_loss"] < 0.4
    held = load_file(done.adapter / "adapter_model.safetensors")
    assert {name.split(".", 2)[2] for name in held if "lora" not in name} == {
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
    }  # fmt: skip
    record = json.loads((done.adapter / "labels.json").read_text())
    assert record == {"labels": ["bad", "good"], "problem_type": "single_label_classification"}
    resolved = (tmp_path / "out" / "config.resolved.yaml").read_text()
    assert "labels: [bad, good]" in resolved or "- bad" in resolved
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| task | classification; 2 labels: bad, good |" in card
    assert "pipeline_tag: text-classification" in card
    assert "id2label={0: 'bad', 1: 'good'}" in card
    assert "held-out accuracy" in card

    base, merged = config["model"]["id"], tmp_path / "merged"
    merge(tmp_path / "out", merged, base=base, dtype="auto", onto="trained", rows=2, data=None, force=False)
    plain = cast(Any, AutoModelForSequenceClassification.from_pretrained(merged))
    assert plain.config.id2label == {0: "bad", 1: "good"}
    adapted = lorary.load(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), done.adapter)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(adapted.eval()(input_ids=ids).logits.argmax(), plain.eval()(input_ids=ids).logits.argmax())
    assert float((adapted(input_ids=ids).logits - plain(input_ids=ids).logits).detach().abs().max()) < 1e-5


def test_the_new_head_is_drawn_from_the_seed(tmp_path: Path) -> None:
    base, heads = saved(tmp_path, "RobertaForMaskedLM"), []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        config = settings(tmp_path, "classification", base, LABELLED, max_steps=1, lr=1e-9, seed=seed)
        done = train(config | {"method": {"r": 2, "targets": "query, value, classifier.dense"}}, overwrite=True)
        held = load_file(done.adapter / "adapter.safetensors")
        heads.append(held["classifier.dense.weight"])  # under an adapter: never trained, and saved
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("method", [{"name": "qlora", "r": 2}, {"r": 2, "drop": {"threshold": 0.5, "sample": 0.5}}])
def test_an_adapter_fits_its_base_with_another_new_head(method: dict[str, Any], tmp_path: Path) -> None:
    """Also of a base that was quantised while it was read, and after LoRA-drop's probe."""
    base = saved(tmp_path, "RobertaForMaskedLM")
    done = train(settings(tmp_path, "classification", base, LABELLED, max_steps=2, lr=1e-2) | {"method": method})
    torch.manual_seed(99)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    lorary.load(fresh, done.adapter)
    other = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with torch.no_grad():
        other.roberta.embeddings.LayerNorm.weight.mul_(2.0)
    with pytest.raises(LoraryError, match="other weights"):
        lorary.load(other, done.adapter)


def test_a_reward_rises(tmp_path: Path) -> None:
    config = config_of("grpo", tmp_path)
    config["training"] |= {
        "max_steps": 12,
        "lr": 1e-2,
        "grpo_beta": 0.0,
        "max_completion_length": 12,
        "save_steps": 100,
    }
    rewards = [record["reward"] for record in train(config).history if "reward" in record]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])


def test_numbers_and_several_labels(tmp_path: Path) -> None:
    """A number to predict (regression), and several labels of a text, with a classifier of Llama's kind."""
    values = [{"text": row["text"], "label": float(i % 2)} for i, row in enumerate(LABELLED)]
    config = settings(tmp_path, "classification", "builtin:base", values, lr=1e-3, max_steps=2)
    config["data"]["validation_split"] = 0.25
    first = train(config)
    assert "eval_mean_absolute_error" in first.history[-2]
    assert json.loads((first.adapter / "labels.json").read_text())["problem_type"] == "regression"
    several = [{"text": row["text"], "label": ["book", row["label"]]} for row in LABELLED]
    config = settings(tmp_path, "classification", "builtin:base", several, lr=1e-3, max_steps=2)
    config["data"]["validation_split"] = 0.25
    second = train(config, overwrite=True)
    assert "eval_label_accuracy" in second.history[-2]
    assert json.loads((second.adapter / "labels.json").read_text())["labels"] == ["bad", "book", "good"]


def test_early_stopping_follows_the_reward(tmp_path: Path) -> None:
    config = config_of("grpo", tmp_path)
    config["data"] |= {"validation_split": 0.5}
    config["training"] |= {"early_stopping_patience": 1, "eval_steps": 1, "save_steps": 1, "max_steps": 6, "lr": 1e-9}
    config["training"] |= {"gradient_accumulation_steps": 1}
    done = train(config)
    assert done.steps < 6
    assert "held-out mean reward" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


# --- what cannot be trained -------------------------------------------------------------------------------------------


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(LoraryError) as error:
        prepare(from_dict(config))
    return str(error.value)


@pytest.mark.parametrize(
    ("code", "named", "message"),
    [
        ("", "spaces", "`spaces` does not name a function in a file\n      hint: write FILE.py:FUNCTION, such as"),
        ("def space(completions): ...", "{}:spaces", "has no function `spaces`\n      hint: did you mean `space`?"),
        ("import nothing_here", "{}:spaces", "r.py cannot be run: ModuleNotFoundError: No module named 'nothing_here'"),
        ("import sys; sys.exit()", "{}:f", "r.py cannot be run: SystemExit"),
        ("f = max", "{}:f", "the parameters of `f` in r.py are not known"),
        ("def f(completions, anser): ...", "{}:f", "f needs `anser`, which no field of the rows has\n      hint: did you mean `answer`?"),  # noqa: E501
    ],
)  # fmt: skip
def test_reward_functions_that_cannot_be_used(code: str, named: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(code)
    config = config_of("grpo", tmp_path)
    config["training"]["reward"] = named.format(tmp_path / "r.py")
    found = refused(config)
    assert found.startswith("cannot use the reward function:\n  - training.reward: ")
    assert message in found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "returned a float, not a list of 8 numbers"),
        ("return [1.0]", "returned 1 rewards for 8 answers"),
        ("return [float('nan')] * 8", "returned nan, which is not a finite number"),
        ("raise KeyError('x')", "raised KeyError: 'x' (line 2 of r.py)"),
        ("raise SystemExit(0)", "raised SystemExit: 0 (line 2 of r.py)"),
        ("raise ValueError('\\udc80')", "raised ValueError: ? (line 2 of r.py)"),
        ("return [None] * 8", "returned None, which is not a finite number"),
        ("return [1e30] * 8", "returned 1e+30, which is not between -1e+18 and 1e+18"),
        ("return [10**5000] * 8", "returned a int, which is not between -1e+18 and 1e+18"),
    ],
)
def test_rewards_that_are_none(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(f"def f(completions):\n    {body}\n")
    reward = load_reward(f"{tmp_path / 'r.py'}:f")
    with pytest.raises(TrainingError) as error:
        reward(completions=["x"] * 8, prompts=["y"] * 8)
    assert str(error.value) == f"the reward function failed:\n  - {tmp_path / 'r.py'}:f: {message}"


@pytest.mark.parametrize("number", ["numpy.float32(0.5)", "torch.tensor(0.5)", "True"])
def test_numbers_of_other_libraries_are_rewards(number: str, tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(f"import numpy, torch\ndef f(completions): return [{number}] * len(completions)")
    rewards = load_reward(f"{tmp_path / 'r.py'}:f")(completions=["x"] * 2)
    assert rewards == [1.0 if number == "True" else 0.5] * 2
    assert all(type(reward) is float for reward in rewards)


def test_too_few_prompts_for_a_step(tmp_path: Path) -> None:
    config = config_of("grpo", tmp_path)
    config["training"]["batch_size"] = 64
    with pytest.raises(DataError, match="there are 8 prompts, and a step takes 32"):
        prepare(from_dict(config))


@pytest.mark.parametrize(
    ("labels", "wanted", "message"),
    [
        (["a"] * 4, None, "label: every row has the label `a`\n      hint: a classifier needs two labels"),
        (["a", 0.5], None, "rows.jsonl:2: `label` is 0.5, and that of the first row 'a'"),
        (["a", "b", "bb"], ["a", "b"], "the label `bb` is not one of data.labels"),
        ([0.5, 1.5], ["a", "b"], "lists names, and the labels of the data are decimal numbers to predict"),
    ],
)
def test_labels_that_cannot_be_used(labels: list[Any], wanted: list[str] | None, message: str, tmp_path: Path) -> None:
    values = [{"text": "x", "label": label} for label in labels]
    config = settings(tmp_path, "classification", "builtin:base", values)
    if wanted:
        config["data"]["labels"] = wanted
    assert message in refused(config)


def test_a_saved_classifier_keeps_its_labels(tmp_path: Path) -> None:
    names = {0: "good", 1: "bad"}
    ids = {"good": 0, "bad": 1}
    base = saved(tmp_path, "BertForSequenceClassification", id2label=names, label2id=ids)
    config = settings(tmp_path, "classification", base, LABELLED)
    prepared = prepare(from_dict(config))
    assert prepared.config.data.labels == ("good", "bad")
    assert prepared.base is not None
    assert prepared.base.fresh == ()
    assert "data.max_length: 64, the positions that BertForSequenceClassification has" in prepared.notes
    others = settings(tmp_path, "classification", base, [{"text": "x", "label": label} for label in "gu"])
    assert "the label `g` is not one of the base's head" in refused(others)
    others["data"]["labels"] = ["g", "u"]
    assert "data.labels: are g, u, and the head of" in refused(others)
    others["data"]["labels"] = ["g", "u", "v"]  # another number of labels is a new head
    assert set(cast(Any, prepare(from_dict(others)).base).fresh) == {"classifier.weight", "classifier.bias"}


def test_a_new_head_cannot_stay_as_it_was_drawn(tmp_path: Path) -> None:
    config = settings(tmp_path, "classification", "builtin:base", LABELLED) | {"method": {"head": "frozen"}}
    with pytest.raises(ConfigError, match="has no head for this task: it is drawn at random, and would stay so"):
        prepare(from_dict(config))
