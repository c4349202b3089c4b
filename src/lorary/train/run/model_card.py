"""The model card of a run: measured numbers, no placeholders, and nothing about the machine's folders.

Its metadata is what the Hub indexes: the base it adapts, the data sets, the held-out metrics. Only what is on the Hub
is named there; the card's text names the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import lorary
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.model.fingerprint import base_name
from lorary.model.plan import Plan, human_bytes
from lorary.train.config.config import Config


@dataclass(frozen=True)
class Facts:
    """The facts of a run that its card states.

    Args:
        config: the resolved configuration.
        plan: what was attached.
        rows: examples learnt from, and held out.
        labelled: share of their tokens that are learnt.
        steps: optimizer steps.
        tokens: tokens seen.
        seconds: of the last session.
        history: the records of `metrics.jsonl`.
        predicted: bytes of memory that were expected; None where they were not computed.
        measured: bytes that it took.
        versions: package -> version.
    """

    config: Config
    plan: Plan
    rows: tuple[int, int]
    labelled: float
    steps: int
    tokens: int
    seconds: float
    history: Sequence[Mapping[str, Any]]
    predicted: int | None
    measured: int
    versions: Mapping[str, str]


def card(name: str, facts: Facts, adapter: Path) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        name: of the run.
        facts: what it tells.
        adapter: the adapter's folder, for what is in it.
    """
    base = public(facts.config.model.id)
    as_peft = (adapter / PEFT_CONFIG).is_file()
    sections = [
        f"---\n{_metadata(name, facts, as_peft).to_yaml()}\n---",
        f"# {name}",
        f"An adapter for `{base}`: {facts.plan.trainable:,} numbers were trained ({facts.plan.share:.3%} of the base).",
        _table("Training", _training(facts)),
        _table("Result", _result(facts)),
        "## Use\n\n" + _use(base, as_peft),
        "Made with " + ", ".join(f"{package} {version}" for package, version in facts.versions.items()) + ".",
    ]
    return str(ModelCard("\n\n".join(sections) + "\n"))


def _metadata(name: str, facts: Facts, as_peft: bool) -> ModelCardData:
    """The card's front matter."""
    config = facts.config
    base = _on_hub(config.model.id)
    results = _evaluation(facts)
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


def _evaluation(facts: Facts) -> list[EvalResult]:
    """The held-out metrics of the adapter that was kept."""
    held_out = _held_out(facts)
    if held_out is None or not math.isfinite(held_out[1]["eval_loss"]):
        return []
    loss, data = held_out[1]["eval_loss"], facts.config.data
    values = {"loss": loss} | ({"perplexity": math.exp(loss)} if _is_perplexity(loss, facts) else {})
    sources = data.validation or data.train
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_on_hub(sources[0]) or public(sources[0]),
            dataset_name=", ".join(public(source) for source in sources),
            dataset_split="held out",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]


def _on_hub(source: str) -> str | None:
    """The Hub id of a model or data set; None for what is not on the Hub, and must not be linked there."""
    name = source.partition("#")[0]
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    return name


def public(source: str) -> str:
    """A name that may be read by others: of a folder or file only its last part."""
    return source if source.startswith("builtin:") else base_name(source)


def _training(facts: Facts) -> dict[str, str]:
    t, rows = facts.config.training, facts.rows
    held_out = f", {rows[1]:,} held out" if rows[1] else ""
    names = " + ".join(facts.config.method.name)
    return {
        "method": f"{names}: {_words(facts.plan)}",
        "data": ", ".join(public(source) for source in facts.config.data.train),
        "examples": f"{rows[0]:,}{held_out}; {facts.labelled:.1%} of the tokens are learnt",
        "steps": f"{facts.steps:,} of {t.batch_size} × {t.gradient_accumulation_steps} rows, {facts.tokens:,} tokens",
        "learning rate": f"{t.lr:g}, {t.schedule}, warmup {t.warmup:g}, {t.optimizer}",
        "seed": str(t.seed),
        "time": f"{facts.seconds:,.0f} s in the last session",
        "memory": f"{human_bytes(facts.measured)} measured"
        + (f", {human_bytes(facts.predicted)} predicted" if facts.predicted is not None else ""),
    }


def _words(plan: Plan) -> str:
    """The method's components in one line."""
    return "; ".join(re.sub(r"  +", " ", row.strip()) for row in str(plan.method).splitlines()[1:])


def _result(facts: Facts) -> dict[str, str]:
    losses = [r for r in facts.history if r.get("loss") is not None]
    found = {}
    if losses:
        found["training loss"] = (
            f"{losses[0]['loss']:.4f} at step {losses[0]['step']}, {losses[-1]['loss']:.4f} at the end"
        )
    if held_out := _held_out(facts):
        first, kept = held_out
        before = f"{_loss(first['eval_loss'], facts)} before training, " if first["step"] == 0 else ""
        found["held-out loss"] = f"{before}{_loss(kept['eval_loss'], facts)} at step {kept['step']}"
    return found


def _held_out(facts: Facts) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first evaluation, and that of the adapter that was kept: the best with early stopping, else the last."""
    found = [r for r in facts.history if r.get("eval_loss") is not None]
    if not found:
        return None
    keeps_best = facts.config.training.early_stopping_patience is not None
    return found[0], min(found, key=lambda r: r["eval_loss"]) if keeps_best else found[-1]


def _loss(value: float, facts: Facts) -> str:
    return f"{value:.4f}" + (f" (perplexity {math.exp(value):.2f})" if _is_perplexity(value, facts) else "")


def _is_perplexity(loss: float, facts: Facts) -> bool:
    """Whether exp(loss) is a perplexity: of a loss per token it is, of DPO's not."""
    return facts.config.task == "sft" and loss < 50


def _table(title: str, rows: Mapping[str, str]) -> str:
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _use(base: str, as_peft: bool) -> str:
    model = base if not base.startswith("builtin:") else "lorary.builtin.path()"
    name = model if model != base else f'"{base}"'
    code = f"""```python
import lorary{".builtin" if model != base else ""}
from transformers import AutoModelForCausalLM

model = lorary.load(AutoModelForCausalLM.from_pretrained({name}), "adapter")
```"""
    return code + ("\n\nPEFT reads the folder as well." if as_peft else "")


def versions() -> dict[str, str]:
    """The versions of what trained."""
    from importlib import metadata

    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")
    return {"lorary": lorary.__version__} | {p: metadata.version(p) for p in packages}
