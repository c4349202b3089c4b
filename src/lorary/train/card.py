"""The model card of a run: true numbers, no placeholders, and nothing about the machine's folders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import lorary
from lorary.fingerprint import base_name
from lorary.formats.peft.config import NAME as PEFT_CONFIG
from lorary.plans import Plan, human_bytes
from lorary.train.config import Config


@dataclass(frozen=True)
class Facts:
    """What a card tells.

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
    front: dict[str, Any] = {"library_name": "peft" if as_peft else "lorary", "tags": _tags(facts.config)}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        front["base_model"] = base  # a Hub id; what is not on the Hub must not be linked there
    head = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    sections = [
        f"---\n{head}---",
        f"# {name}",
        f"An adapter for `{base}`: {facts.plan.trainable:,} numbers were trained ({facts.plan.share:.3%} of the base).",
        _table("Training", _training(facts)),
        _table("Result", _result(facts)),
        "## Use\n\n" + _use(base, as_peft),
        "Made with " + ", ".join(f"{package} {version}" for package, version in facts.versions.items()) + ".",
    ]
    return "\n\n".join(sections) + "\n"


def public(source: str) -> str:
    """A name that may be read by others: of a folder or file only its last part."""
    return source if source.startswith("builtin:") else base_name(source)


def _tags(config: Config) -> list[str]:
    return sorted({"lorary", config.task, *config.method.name})


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
    """The method's words in one line."""
    return "; ".join(re.sub(r"  +", " ", row.strip()) for row in str(plan.method).splitlines()[1:])


def _result(facts: Facts) -> dict[str, str]:
    losses = [r for r in facts.history if r.get("loss") is not None]
    held_out = [r for r in facts.history if r.get("eval_loss") is not None]
    found = {}
    if losses:
        found["training loss"] = (
            f"{losses[0]['loss']:.4f} at step {losses[0]['step']}, {losses[-1]['loss']:.4f} at the end"
        )
    if held_out:
        keeps_best = facts.config.training.early_stopping_patience is not None
        first, last = held_out[0], min(held_out, key=lambda r: r["eval_loss"]) if keeps_best else held_out[-1]
        before = f"{_loss(first['eval_loss'], facts)} before training, " if first["step"] == 0 else ""
        found["held-out loss"] = f"{before}{_loss(last['eval_loss'], facts)} at step {last['step']}"
    return found


def _loss(value: float, facts: Facts) -> str:
    """A loss per token also as a perplexity; DPO's is neither."""
    return f"{value:.4f}" + (
        f" (perplexity {math.exp(value):.2f})" if facts.config.task == "sft" and value < 50 else ""
    )


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
