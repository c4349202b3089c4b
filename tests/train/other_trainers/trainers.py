"""Other people's trainers over a tiny Llama with a method attached: 4 optimizer steps, a checkpoint at every second."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import lorary
from tests.train.runs import VOCABULARY, adapted, llama, pairs, rows
from tests.train.small import tokenizer

# method -> its presets and options; the ranks of AdaLoRA fall in the third of four steps
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "lora+": (("lora", "lora+"), {"r": 4}),
    "adalora": (("adalora",), {"r": 4, "target": 2, "start": 1, "final": 1}),
    "dora": (("dora",), {"r": 4}),
    "pissa": (("pissa",), {"r": 4}),
}

_TEXT = [{"prompt": "hello world", "completion": f" the answer {i}"} for i in range(16)]
_PREFERRED = [{"prompt": "hello", "chosen": f" the answer {i}", "rejected": f" two {i}"} for i in range(16)]
_JUDGED = [{**row, "label": i % 2 == 0} for i, row in enumerate(_TEXT)]


def _rewards(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def _plain_rows() -> list[dict[str, torch.Tensor]]:
    ids = [torch.arange(i, i + 8) % VOCABULARY for i in range(16)]
    return [{"input_ids": row, "labels": row} for row in ids]


# trainer -> (class, class of its arguments, rows, further settings, further arguments)
TRAINERS: dict[str, tuple[Any, Any, Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "Trainer": (Trainer, TrainingArguments, _plain_rows, {}, {}),
    "SFTTrainer": (SFTTrainer, SFTConfig, lambda: Dataset.from_list(_TEXT), {}, {}),
    "DPOTrainer": (DPOTrainer, DPOConfig, lambda: Dataset.from_list(_PREFERRED), {}, {}),
    "KTOTrainer": (KTOTrainer, KTOConfig, lambda: Dataset.from_list(_JUDGED), {}, {}),
    "RewardTrainer": (RewardTrainer, RewardConfig, lambda: Dataset.from_list(_PREFERRED), {}, {}),
    "GRPOTrainer": (
        GRPOTrainer,
        GRPOConfig,
        lambda: Dataset.from_list([{"prompt": f"hello {i}"} for i in range(16)]),
        {"beta": 0.1, "num_generations": 2, "max_completion_length": 6},
        {"reward_funcs": _rewards},
    ),
}

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "log_level": "error",
    "dataloader_pin_memory": False,
}


def model(method: str, trainer: str = "Trainer", **options: Any) -> Any:
    """The trainer's tiny model with a method attached to its queries and values."""
    presets, settings = METHODS.get(method, ((method,), {"r": 4}))
    base = llama()
    if trainer == "RewardTrainer":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(  # type: ignore[assignment]
            LlamaConfig(num_key_value_heads=2, vocab_size=VOCABULARY, num_labels=1, pad_token_id=1, **sizes)
        )
    return adapted(*presets, model=base, **({"targets": "attention-qv"} | settings | options))


def train(
    folder: Path,
    trainer: str,
    adapted_model: Any,
    *,
    resume: Path | None = None,
    rules: bool = True,
    optimizer: bool = True,
    **settings: Any,
) -> Any:
    """The trainer after its run.

    Args:
        folder: its output folder.
        trainer: a name of `TRAINERS`.
        adapted_model: from `model`.
        resume: a checkpoint.
        rules: whether it has lorary's callback.
        optimizer: whether it has lorary's optimizer.
        settings: further ones of its arguments; `train_dataset`, `eval_dataset`, `callbacks` of its own.
    """
    cls, arguments, data, more, others = TRAINERS[trainer]
    own = {k: settings.pop(k) for k in ("train_dataset", "eval_dataset") if k in settings}
    callbacks = settings.pop("callbacks", [])
    with warnings.catch_warnings():  # TRL asks Transformers by old names
        warnings.filterwarnings("ignore", "`.*gradient_checkpointing.*` is deprecated", FutureWarning)
        args = arguments(str(folder), **(SETTINGS | more | settings))
        made = cls(
            model=adapted_model,
            args=args,
            **({"train_dataset": data()} | own),
            **others,
            **({} if trainer == "Trainer" else {"processing_class": tokenizer()}),
            callbacks=[*callbacks, *([lorary.TrainerCallback(adapted_model)] if rules else [])],
            optimizers=(lorary.optimizer(adapted_model, lr=args.learning_rate), None) if optimizer else (None, None),
        )
        made.train(resume_from_checkpoint=str(resume) if resume else None)
    return made


def values(trained: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return {
        f"{site}.{role}": t for site, roles in lorary.Adapter.of(trained).tensors.items() for role, t in roles.items()
    }


def same(one: Any, other: Any) -> bool:
    """Whether two adapted models have the same adapter, bit for bit."""
    here, there = values(one), values(other)
    return here.keys() == there.keys() and all(torch.equal(t, there[name]) for name, t in here.items())


def apart(one: Any, other: Any) -> float:
    """The greatest difference between the adapters of two models."""
    here, there = values(one), values(other)
    assert {k: t.shape for k, t in here.items()} == {k: t.shape for k, t in there.items()}
    return max(float((t - there[name]).abs().max()) for name, t in here.items() if t.numel())


__all__ = ["METHODS", "SETTINGS", "TRAINERS", "apart", "model", "pairs", "rows", "same", "train", "values"]
