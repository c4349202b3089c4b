"""Tiny training runs: a Llama of 32 dimensions on 23 rows that count upwards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, SFTConfig

import lorary
from lorary.train.trainer.dpo import DPOTrainer
from lorary.train.trainer.sft import SFTTrainer
from tests import tiny
from tests.train.small import tokenizer

VOCABULARY = 300
TIMES = ("runtime", "per_second")  # fields of the log that tell the time


def llama(**changes: Any) -> LlamaForCausalLM:
    """The same numbers at every call."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, vocab_size=VOCABULARY, **(sizes | changes)))


def adapted(*presets: str, targets: Any = "all-linear", seed: int = 0, model: Any = None, **options: Any) -> Any:
    """A Llama with a method attached: LoRA of rank 4 if nothing else is said."""
    model = model if model is not None else llama(attention_dropout=options.pop("attention_dropout", 0.0))
    method = lorary.method(*(presets or ("lora",)), **({"r": 4} | options))
    plan = lorary.plan(model, method, targets)
    return lorary.attach(model, plan, seed=seed, data=tiny.data_for(plan))


def base_folder(folder: Path) -> Path:
    """That Llama on disk, in bfloat16, with its tokenizer."""
    llama(bos_token_id=0, eos_token_id=1, pad_token_id=1).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


WORDS = ("hello", "world", "the", "answer", "is", "two", "three")


def configuration(base: Path, data: Path) -> dict[str, Any]:
    """A configuration as it is in a file: 20 questions, 4 held out, 6 steps; the questions are written here."""
    asked = [{"prompt": f"{WORDS[i % 7]} {WORDS[i % 5]}", "completion": f" {WORDS[i % 3]} {i}"} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return {
        "model": str(base),
        "method": {"name": "lora", "r": 4},
        "data": {"train": str(data), "validation_split": 0.2, "max_length": 64},
        "training": {
            "max_steps": 6,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "lr": 1e-3,
            "logging_steps": 2,
            "eval_steps": 3,
            "save_steps": 2,
        },
        "output": "out",
    }


def changed(words: dict[str, Any], section: str, **changes: Any) -> dict[str, Any]:
    """A configuration with other values in one section."""
    return words | {section: words[section] | changes}


def rows(count: int = 23, masked: int = 3) -> Dataset:
    """Runs of 6 to 13 numbers that count upwards; the first `masked` have no label."""
    made = []
    for i in range(count):
        ids = [(17 * i + k) % 280 + 5 for k in range(6 + (5 * i) % 8)]
        made.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return Dataset.from_list(made)


def pairs(count: int = 9) -> Dataset:
    """Preference pairs of tokens: counting upwards is better than not."""
    made = []
    for i in range(count):
        a = 10 + 23 * i
        made.append({"prompt_ids": [a, a + 1], "chosen_ids": [a + 2, a + 3, a + 4, 1], "rejected_ids": [a + 9, a, 1]})
    return Dataset.from_list(made)


_COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "gradient_checkpointing": None,
    "max_length": None,
    "disable_tqdm": True,
    "log_level": "error",
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
}


def sft(folder: Path, model: Any = None, *, train: Any = None, held_out: Any = None, **settings: Any) -> SFTTrainer:
    """A trainer on `rows()`: 12 optimizer steps in two epochs, if nothing else is said."""
    args = SFTConfig(str(folder), **(_COMMON | settings))
    return SFTTrainer(
        model=model if model is not None else adapted(),
        args=args,
        train_dataset=train if train is not None else rows(),
        eval_dataset=held_out,
        processing_class=tokenizer(),
    )


def dpo(folder: Path, model: Any = None, **settings: Any) -> DPOTrainer:
    """A trainer on `pairs()`: 6 optimizer steps, if nothing else is said."""
    args = DPOConfig(
        str(folder), **(_COMMON | {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 3} | settings)
    )
    model = model if model is not None else adapted()
    return DPOTrainer(model=model, args=args, train_dataset=pairs(), processing_class=tokenizer())


def log(trainer: Any) -> list[dict[str, Any]]:
    """The log without what depends on the time."""
    return [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in trainer.state.log_history]


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def frozen(model: nn.Module) -> str:
    """A fingerprint of every parameter that does not train."""
    return _hash(model, trained=False)


def trained(model: nn.Module) -> str:
    """A fingerprint of every parameter that trains, bit for bit."""
    return _hash(model, trained=True)


def _hash(model: nn.Module, trained: bool) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad == trained:
            digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
