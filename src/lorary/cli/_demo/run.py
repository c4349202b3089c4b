"""The steps of a demo, by the public API: a configuration, a run, and a dozen calls."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging

import lorary
from lorary import builtin
from lorary.analysis.merge_check import logits
from lorary.analysis.run_sections import Sample
from lorary.builtin import corpora
from lorary.cli._demo.folder import MERGED, RUN
from lorary.errors import DataError
from lorary.model.plan import Plan
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict
from lorary.train.runner.run import run

WINDOW = 128  # tokens per row, in training and in measuring
DESCRIPTIONS = {"builtin:c-headers": "C headers", "builtin:topics": "English prose about Python"}
PROMPTS = {
    "builtin:c-headers": ("PyAPI_FUNC(PyObject *)", "#ifndef Py_LIMITED_API", "static inline int"),
    "builtin:topics": ("The", "If the", "A class"),
}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 56}


@dataclass(frozen=True)
class DemoResult:
    """The results of a demo.

    Args:
        data: the data set.
        plan: what was attached.
        history: the records of `metrics.jsonl`.
        before: perplexity per token of the base on held-out text.
        after: the same with the adapter.
        samples: the same prompts, continued by both models.
        reloaded: largest difference between logits of the trained model and of a fresh base with the saved adapter.
        merged: largest difference between logits of the trained model and of the merged one, read from its folder.
        largest: the largest absolute logit, as a scale for the differences.
        adapter_bytes: of the saved tensors.
        seconds: of the whole demo.
        training: of the training alone.
        folder: the output folder.
    """

    data: str
    plan: Plan
    history: tuple[dict[str, Any], ...]
    before: float
    after: float
    samples: tuple[Sample, ...]
    reloaded: float
    merged: float
    largest: float
    adapter_bytes: int
    seconds: float
    training: float
    folder: Path


def run_demo(folder: Path, steps: int) -> DemoResult:
    """The whole demo, reported on the terminal as it runs.

    Args:
        folder: an empty folder.
        steps: number of optimizer steps.
    """
    start = time.perf_counter()
    transformers_logging.disable_progress_bar()  # of loading weights: the model is small
    console = Console(highlight=False)
    data = _choose_data()
    config = _config(data, steps, folder / RUN)
    model, tokenizer = builtin.load_model(), builtin.load_tokenizer()
    rows = _held_out_rows(tokenizer, data)

    _heading(console, f"A language model of {model.num_parameters():,} parameters that has only read Python …")
    before = _perplexity(model, rows)
    base = _continuations(model, tokenizer, PROMPTS[data])
    console.print(f"perplexity on {DESCRIPTIONS[data]}: {before:.1f}")

    plan = lorary.plan(model, config.method.build(), config.method.targets)
    _heading(console, f"… learns {DESCRIPTIONS[data]}. The plan:")
    console.print(str(plan), soft_wrap=True, markup=False)

    _heading(console, f"Training: {steps} steps of {config.training.batch_size} × {WINDOW} tokens")
    keep = _KeepModel()
    done = run(config, callbacks=[keep])
    if done.interrupted:
        raise SystemExit(128 + done.interrupted)

    _heading(console, "Before and after")
    after = _perplexity(keep.model, rows)
    adapted = _continuations(keep.model, tokenizer, PROMPTS[data])
    samples = tuple(map(Sample, PROMPTS[data], base, adapted))

    reloaded_model: Any = lorary.load(builtin.load_model(), done.adapter)
    compared = {"input_ids": rows[:8]}
    trained, reloaded = logits(keep.model, compared), logits(reloaded_model, compared)
    lorary.merge(reloaded_model)
    reloaded_model.save_pretrained(folder / MERGED)
    tokenizer.save_pretrained(folder / MERGED)
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / MERGED, dtype=torch.float32), compared)
    return DemoResult(
        data=data,
        plan=plan,
        history=done.history,
        before=before,
        after=after,
        samples=samples,
        reloaded=_largest_magnitude(reloaded - trained),
        merged=_largest_magnitude(merged - trained),
        largest=_largest_magnitude(trained),
        adapter_bytes=lorary.load_adapter(done.adapter).size,
        seconds=time.perf_counter() - start,
        training=done.seconds,
        folder=folder,
    )


class _KeepModel(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Keeps the trained model, as the reference for the saved and the merged one."""

    model: Any = None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.model = model


def _heading(console: Console, title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def _choose_data() -> str:
    """C headers if this Python has them, else prose."""
    try:
        corpora.load("builtin:c-headers", "validation")
    except DataError:
        return "builtin:topics"
    return "builtin:c-headers"


def _config(data: str, steps: int, output: Path) -> Config:
    return from_dict(
        {
            "model": {"id": "builtin:base", "dtype": "float32"},  # not auto: the demo shows exactness
            "method": {"name": "lora", "r": 16, "alpha": 32},
            "data": {"train": data, "validation": data, "max_length": WINDOW},
            "training": {
                "max_steps": steps,
                "batch_size": 8,
                "eval_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "lr": 2e-3,
                "logging_steps": max(1, steps // 40),
                "eval_steps": max(1, steps // 2),
                "save_steps": steps,
            },
            "output": str(output),
        }
    )


def _held_out_rows(tokenizer: Any, name: str, most: int = 96) -> Tensor:
    """At most `most` rows of held-out text, evenly spread: [rows, WINDOW] token ids."""
    texts = [record["text"] for record in corpora.load(name, "validation")]
    ids = torch.tensor([i for row in tokenizer(texts)["input_ids"] for i in row])
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()]


@torch.inference_mode()
def _perplexity(model: Any, rows: Tensor) -> float:
    """exp of the mean loss per predicted token, in nats."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(16)]
    return math.exp(sum(losses) / len(rows))


def _largest_magnitude(values: Tensor) -> float:
    return float(values.abs().max())


@torch.inference_mode()
def _continuations(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[str]:
    """Sampled continuations of each prompt, with the same random numbers for every model."""
    texts = []
    for prompt in prompts:
        row = tokenizer(prompt, return_tensors="pt")
        torch.manual_seed(0)
        ids = model.generate(**row, **SAMPLING)
        texts.append(tokenizer.decode(ids[0, row["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts
