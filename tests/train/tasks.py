"""Tiny bases, data and configurations for the tasks of `lorary train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lorary import builtin
from lorary.train.config.load import from_dict
from lorary.train.runner.result import Run
from lorary.train.runner.run import run

LABELLED = [{"text": f"a {'fine' if i % 2 else 'poor'} book", "label": "good" if i % 2 else "bad"} for i in range(16)]
PAIRS = [{"prompt": f"say {i}: ", "chosen": f"yes {i}", "rejected": f"no no {i}"} for i in range(12)]
JUDGED = [{"prompt": f"say {i}: ", "completion": "yes" if i % 2 else "no", "label": bool(i % 2)} for i in range(12)]
PROMPTS = [{"prompt": f"def f{i}", "answer": str(i)} for i in range(8)]
REWARDS = """
def spaces(completions, answer):
    assert len(answer) == len(completions)
    return [text.count(" ") / max(len(text), 1) for text in completions]
"""
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def saved(folder: Path, name: str, **settings: Any) -> str:
    """A random model of this class with the built-in tokenizer, in a folder of its name."""
    cls: Any = getattr(transformers, name)
    tokenizer = builtin.load_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    if name.startswith("T5"):
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    elif name.startswith("DistilBert"):
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    elif name.startswith("ViT"):
        tokens, sizes = {"image_size": 16, "patch_size": 8}, dict(_SIZES)
    else:
        sizes = dict(_SIZES)
    if name.startswith("T5"):
        del tokens["max_position_embeddings"]
    torch.manual_seed(0)
    model = cls(cls.config_class(**(tokens | sizes | settings)))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def rows(folder: Path, values: Sequence[dict[str, Any]], name: str = "rows") -> str:
    """A file of rows."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def settings(folder: Path, task: str, model: str, values: Sequence[dict[str, Any]], **training: Any) -> dict[str, Any]:
    """A short run of a task."""
    common = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 2}
    return {
        "model": {"id": model, "dtype": "float32"},
        "task": task,
        "data": {"train": rows(folder, values)},
        "method": {"r": 4},
        "training": common | training,
        "output": str(folder / "out"),
    }


def train(config: dict[str, Any], **options: Any) -> Run:
    """The run of a configuration."""
    return run(from_dict(config), quiet=True, **options)


def figures(done: Run) -> list[dict[str, Any]]:
    """The history of a run without its times."""
    times = ("runtime", "per_second")
    return [{k: v for k, v in record.items() if not any(t in k for t in times)} for record in done.history]


def tensors(done: Run) -> bytes:
    """The file of the adapter's tensors."""
    return next(path for path in done.adapter.iterdir() if path.suffix == ".safetensors").read_bytes()
