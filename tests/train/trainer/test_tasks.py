"""The trainers of the tasks beside Transformers' and TRL's own: the same losses from the same seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PrinterCallback

import lorary
from lorary import builtin
from lorary.train.data.task_rows import Labels
from lorary.train.trainer.classification import ClassificationTrainer
from lorary.train.trainer.grpo import GRPOTrainer
from lorary.train.trainer.kto import KTOTrainer
from lorary.train.trainer.reward import RewardTrainer
from lorary.train.trainer.reward_function import Reward

COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "activation_checkpointing": False,
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    plain = {} if kind is transformers.TrainingArguments else {"gradient_checkpointing": None, "bf16": False}
    return kind(output_dir=str(folder), **COMMON | plain | options)


def adapted(model: Any) -> Any:
    model.name_or_path = model.config._name_or_path = str(builtin.path())
    return lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4), ["q_proj", "v_proj"]), seed=1)


def causal() -> Any:
    return adapted(builtin.load_model(torch.float32))


def classifier(labels: int) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_labels": labels, "dtype": torch.float32, "pad_token_id": 0}
    return adapted(AutoModelForSequenceClassification.from_pretrained(builtin.path(), **options))


def losses(trainer: Any) -> list[dict[str, float]]:
    """The logged figures of a run that both trainers have."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    keys = ("loss", "grad_norm", "reward", "kl", "entropy", "accuracy", "margin", "rewards/chosen")
    return [
        {k: float(record[k]) for k in keys if k in record} for record in trainer.state.log_history if "loss" in record
    ]


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        common = mine.keys() & other.keys()
        assert {"loss", "grad_norm"} <= common
        assert {k: mine[k] for k in common} == pytest.approx({k: other[k] for k in common}, rel=1e-4, abs=1e-6)


def test_kto_is_trls(tmp_path: Path) -> None:
    tokenizer = builtin.load_tokenizer()
    text = [{"prompt": f"say {i}: ", "completion": "yes" * (1 + i % 3), "label": i % 2 == 0} for i in range(24)]
    rows = []
    for row in text:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(f"{row['prompt']}{row['completion']}{tokenizer.eos_token}")["input_ids"]
        at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        rows.append({"prompt_ids": whole[:at], "completion_ids": whole[at:], "label": row["label"]})
    options: dict[str, Any] = {"processing_class": tokenizer}
    args = [arguments(trl.KTOConfig, tmp_path, max_length=None, disable_dropout=False) for _ in range(2)]
    ours = KTOTrainer(model=causal(), args=args[0], train_dataset=Dataset.from_list(rows), **options)
    theirs = trl.KTOTrainer(
        model=causal(), ref_model=builtin.load_model(torch.float32), args=args[1],
        train_dataset=Dataset.from_list(text), **options,
    )  # fmt: skip
    found = losses(ours)
    same(found, losses(theirs))
    assert found[-1]["loss"] != found[0]["loss"] == 0.5  # nothing moves at step 0


def test_a_reward_model_is_trls(tmp_path: Path) -> None:
    tokenizer = builtin.load_tokenizer()
    pairs = [
        {"chosen_ids": tokenizer(f"say {i} yes")["input_ids"], "rejected_ids": tokenizer(f"say {i} no no")["input_ids"]}
        for i in range(24)
    ]
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
    args = [arguments(trl.RewardConfig, tmp_path, max_length=None, disable_dropout=False) for _ in range(2)]
    found = losses(RewardTrainer(model=classifier(1), args=args[0], **given))
    same(found, losses(trl.RewardTrainer(model=classifier(1), args=args[1], **given)))
    assert found[-1]["loss"] < found[0]["loss"]


def test_a_classification_is_transformers(tmp_path: Path) -> None:
    tokenizer = builtin.load_tokenizer()
    rows = [{**tokenizer(f"a {'fine' if i % 2 else 'poor'} book"), "label": i % 2} for i in range(24)]
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    args = [arguments(transformers.TrainingArguments, tmp_path) for _ in range(2)]
    labels = Labels(("bad", "good"), "single_label_classification")
    found = losses(ClassificationTrainer(model=classifier(2), args=args[0], labels=labels, **given))
    collator = DataCollatorWithPadding(tokenizer)
    plain: Any = transformers.Trainer(model=classifier(2), args=args[1], data_collator=collator, **given)
    plain.model_accepts_loss_kwargs = False
    same(found, losses(plain))
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_is_trls(beta: float, tmp_path: Path) -> None:
    """Two equal prompts, so that the order of the rows, which is seeded in another way, does not matter."""

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]

    tokenizer = builtin.load_tokenizer()
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list([{"prompt": "def f"}] * 6),
        "processing_class": tokenizer,
    }
    options = {"num_generations": 4, "max_completion_length": 8, "beta": beta, "temperature": 1.0}
    args = [arguments(trl.GRPOConfig, tmp_path, **copy.deepcopy(options)) for _ in range(2)]
    found = losses(GRPOTrainer(model=causal(), args=args[0], reward=Reward(vowels, "vowels"), **given))
    same(found, losses(trl.GRPOTrainer(model=causal(), args=args[1], reward_funcs=vowels, **given)))
