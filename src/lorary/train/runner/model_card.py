"""The model card of a run: measured numbers, no placeholders, and nothing about the machine's folders.

The Hub indexes its metadata: the base, the data sets, the held-out metrics. They name only what is on the Hub; the
card's text names the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import lorary
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.model.fingerprint import base_name
from lorary.model.plan import Plan, human_bytes
from lorary.train.config.config import Config
from lorary.train.runner.result import Run


@dataclass(frozen=True)
class CardData:
    """The facts of a run that its card states.

    Args:
        config: the resolved configuration.
        plan: the attached plan.
        rows: examples for training, and held out.
        labelled: the share of their tokens that have a label.
        tokens: tokens seen.
        run: the result.
    """

    config: Config
    plan: Plan
    rows: tuple[int, int]
    labelled: float
    tokens: int
    run: Run


def model_card(name: str, data: CardData) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        name: of the run.
        data: the facts that it states.
    """
    base = public_name(data.config.model.id)
    as_peft = (data.run.adapter / PEFT_CONFIG).is_file()
    sections = [
        f"---\n{_metadata(name, data, as_peft).to_yaml()}\n---",
        f"# {name}",
        f"An adapter for `{base}`: {data.plan.trainable:,} trained parameters ({data.plan.share:.3%} of the base).",
        _table("Training", _training(data)),
        _table("Result", _result(data)),
        "## Use\n\n" + _usage(base, as_peft),
        "Made with " + ", ".join(f"{package} {version}" for package, version in versions().items()) + ".",
    ]
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _metadata(name: str, data: CardData, as_peft: bool) -> ModelCardData:
    """The card's front matter."""
    config, results = data.config, _evaluation(data)
    base = _on_hub(config.model.id)
    return ModelCardData(
        model_name=name,
        library_name="peft" if as_peft else "lorary",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[found for source in config.data.train if (found := _on_hub(source))] or None,
        tags=sorted({"lorary", config.task, *config.method.name}),
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
    )


def _evaluation(data: CardData) -> list[EvalResult]:
    """The held-out metrics of the saved adapter."""
    held_out = _held_out(data)
    if held_out is None or not math.isfinite(held_out[1]["eval_loss"]):
        return []
    loss, sources = held_out[1]["eval_loss"], data.config.data.validation or data.config.data.train
    values = {"loss": loss} | ({"perplexity": math.exp(loss)} if _is_perplexity(loss, data) else {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_on_hub(sources[0]) or public_name(sources[0]),
            dataset_name=", ".join(public_name(source) for source in sources),
            dataset_split="held out",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]


def _on_hub(source: str) -> str | None:
    """The Hub id of a model or data set; None for local and built-in ones, which must not be linked there."""
    name = source.partition("#")[0]
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name


def public_name(source: str) -> str:
    """A name that is safe to publish: of a folder or file only its last part."""
    return source if source.startswith("builtin:") else base_name(source)


def _training(data: CardData) -> dict[str, str]:
    t, rows = data.config.training, data.rows
    held_out = f", {rows[1]:,} held out" if rows[1] else ""
    names = " + ".join(data.config.method.name)
    return {
        "method": f"{names}: {_components(data.plan)}",
        "data": ", ".join(public_name(source) for source in data.config.data.train),
        "examples": f"{rows[0]:,}{held_out}; {data.labelled:.1%} of the tokens are labelled",
        "steps": f"{data.run.steps:,} of {t.batch_size} × {t.gradient_accumulation_steps} rows, {data.tokens:,} tokens",
        "learning rate": f"{t.lr:g}, {t.schedule}, warmup {t.warmup:g}, {t.optimizer}",
        "seed": str(t.seed),
        "time": f"{data.run.seconds:,.0f} s in the last session",
        "memory": _memory(data.run),
    }


def _components(plan: Plan) -> str:
    """The method's components in one line."""
    return "; ".join(re.sub(r"  +", " ", row.strip()) for row in str(plan.method).splitlines()[1:])


def _result(data: CardData) -> dict[str, str]:
    rows = {}
    if losses := [r for r in data.run.history if r.get("loss") is not None]:
        start, end = losses[0], losses[-1]
        rows["training loss"] = f"{start['loss']:.4f} at step {start['step']}, {end['loss']:.4f} at the end"
    if held_out := _held_out(data):
        first, kept = held_out
        before = f"{_loss(first['eval_loss'], data)} before training, " if first["step"] == 0 else ""
        rows["held-out loss"] = f"{before}{_loss(kept['eval_loss'], data)} at step {kept['step']}"
    return rows


def _held_out(data: CardData) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first evaluation and that of the saved adapter: the best one if the run keeps it, else the last."""
    records = [r for r in data.run.history if r.get("eval_loss") is not None]
    if not records:
        return None
    t = data.config.training
    keeps_best = t.keep_best or t.early_stopping_patience is not None
    return records[0], min(records, key=lambda r: r["eval_loss"]) if keeps_best else records[-1]


def _loss(value: float, data: CardData) -> str:
    return f"{value:.4f}" + (f" (perplexity {math.exp(value):.2f})" if _is_perplexity(value, data) else "")


def _is_perplexity(loss: float, data: CardData) -> bool:
    """Whether exp(loss) is a perplexity: true of a loss per token, not of DPO's."""
    return data.config.task == "sft" and loss < 50


def _table(title: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _usage(base: str, as_peft: bool) -> str:
    model = base if not base.startswith("builtin:") else "lorary.builtin.path()"
    name = model if model != base else f'"{base}"'
    code = f"""```python
import lorary{".builtin" if model != base else ""}
from transformers import AutoModelForCausalLM

model = lorary.load(AutoModelForCausalLM.from_pretrained({name}), "adapter")
```"""
    return code + ("\n\nPEFT reads the folder as well." if as_peft else "")


def versions() -> dict[str, str]:
    """The versions of the packages that influence a result."""
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")
    return {"lorary": lorary.__version__} | {p: metadata.version(p) for p in packages}


def evaluations(data: CardData) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first evaluation of a run and that of its saved adapter; None without held-out rows."""
    return _held_out(data)


def _memory(run: Run) -> str:
    """The counted tensors of a step beside their prediction, or else the prediction alone."""
    parts = []
    if run.step_memory is not None:
        counted = run.step_memory.counted
        what = (
            f"{human_bytes(counted.peak)} of tensors in step {counted.step} ({counted.batch} × {counted.length} tokens)"
        )
        parts = [f"{what}, {human_bytes(run.step_memory.predicted)} predicted for it"]
    if run.predicted is not None:
        parts.append(f"{human_bytes(run.predicted)} predicted with the longest rows")
    return "; ".join(parts) or "not predicted: the model's code does not run without values"
