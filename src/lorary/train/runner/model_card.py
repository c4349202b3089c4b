"""The model card of a run: measured numbers, no placeholders, and nothing about the machine's folders.

The Hub indexes its metadata: the base, the data sets, the held-out metrics. They name only what is on the Hub; the
card's text names the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from lorary.adapters.card import (
    CLASSIFICATION,
    GENERATION,
    components,
    front_matter,
    hub_id,
    made_with,
    page,
    public_name,
    table,
    usage,
)
from lorary.adapters.peft.config import NAME as PEFT_CONFIG
from lorary.model.plan import Plan, human_bytes
from lorary.model.vocabulary import vocabulary_with_added
from lorary.spec.presets import presets_of
from lorary.train.config.config import Config
from lorary.train.config.previous_tasks import path_of
from lorary.train.config.sources import paths
from lorary.train.config.training_section import TrainingSection
from lorary.train.runner.result import Run
from lorary.train.trainer.environment import versions

# task -> the Hub's name of what the model does; text generation for all others
_PIPELINES = {"classification": CLASSIFICATION, "reward": CLASSIFICATION}
# figures of an evaluation on the card, besides the loss
_SCORES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "label_accuracy": "accuracy of each label",
    "mean_absolute_error": "mean absolute error",
    "reward": "mean reward",
}


@dataclass(frozen=True)
class CardData:
    """The facts of a run that its card states.

    Args:
        config: the resolved configuration.
        plan: the attached plan.
        rows: examples for training, and held out.
        labelled: the share of their tokens that have a label; 0 for rows without answers.
        tokens: tokens seen.
        run: the result.
        sources: (source, its rows, their tokens) of the training rows.
    """

    config: Config
    plan: Plan
    rows: tuple[int, int]
    labelled: float
    tokens: int
    run: Run
    sources: tuple[tuple[str, int, int], ...] = ()


def model_card(name: str, data: CardData) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        name: of the run.
        data: the facts that it states.
    """
    config, results = data.config, _evaluation(data)
    base, as_peft = public_name(config.model.id), (data.run.adapter / PEFT_CONFIG).is_file()
    head = front_matter(
        name,
        hub_id(config.model.id),
        as_peft=as_peft,
        tags=(config.task, *method_names(config, data.plan)),
        pipeline=_PIPELINES.get(config.task, GENERATION),
        datasets=[found for source in paths(config.data.train) if (found := hub_id(source))] or None,
        metrics=[result.metric_type for result in results] or None,
        eval_results=results or None,
    )
    auto = "AutoModelForSequenceClassification" if config.task in _PIPELINES else "AutoModelForCausalLM"
    labels, outputs = config.data.labels or (), int(config.task in _PIPELINES)
    use = usage(
        base,
        auto,
        "adapter",
        labels,
        as_peft=as_peft,
        outputs=outputs,
        vocabulary=vocabulary_with_added(data.plan.sites),
    )
    return page(
        name,
        head,
        f"An adapter for `{base}`: {data.plan.trainable:,} trained parameters ({data.plan.share:.3%} of the base).",
        table("Training", _training(data)),
        table("Result", _result(data)),
        f"## Use\n\n{use}",
        made_with(versions()),
    )


def _evaluation(data: CardData) -> list[EvalResult]:
    """The held-out metrics of the saved adapter."""
    held_out = evaluations(data)
    if held_out is None or not math.isfinite(held_out[1]["eval_loss"]):
        return []
    loss, sources = held_out[1]["eval_loss"], paths(data.config.data.validation or data.config.data.train)
    values = {"loss": loss} | ({"perplexity": math.exp(loss)} if _is_perplexity(loss, data) else {})
    values |= _scores(held_out[1])
    return [
        EvalResult(
            task_type=_PIPELINES.get(data.config.task, GENERATION),
            dataset_type=hub_id(sources[0]) or public_name(sources[0]),
            dataset_name=", ".join(public_name(source) for source in sources),
            dataset_split="held out",
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]


def _training(data: CardData) -> dict[str, str]:
    t, rows = data.config.training, data.rows
    held_out = f", {rows[1]:,} held out" if rows[1] else ""
    names, start = " + ".join(method_names(data.config, data.plan)), data.config.model.adapter
    task = {} if data.config.task == "sft" else {"task": _described_task(data.config)}
    streamed = "a stream, its first " if data.config.data.streaming else ""
    return {
        **task,
        **({"starts from": f"the adapter {public_name(path_of(start))}"} if start else {}),
        "method": f"{names}: {components(data.plan.method, data.plan.sites)}",
        "data": _data(data),
        "examples": f"{streamed}{rows[0]:,}{held_out}"
        + (f"; {data.labelled:.1%} of the tokens are labelled" if data.labelled else ""),
        "steps": f"{data.run.steps:,} of {t.batch_size} × {t.gradient_accumulation_steps} rows, {data.tokens:,} tokens",
        "learning rate": f"{t.lr:g}, {t.schedule}, warmup {t.warmup:g}, {t.optimizer}",
        "seed": seeds(t),
        "time": f"{data.run.seconds:,.0f} s in the last session",
        "memory": _memory(data.run),
    }


def seeds(training: TrainingSection) -> str:
    """The seed of a run, and that of the order of its rows if it is another one."""
    other = training.order_seed != training.seed
    return f"{training.seed}; {training.order_seed} of the order of the rows" if other else str(training.seed)


def method_names(config: Config, plan: Plan) -> tuple[str, ...]:
    """The presets of a run: the configuration's, or those of the adapter that it goes on from."""
    return presets_of(plan.method) if config.model.adapter else config.method.names


def _memory(run: Run) -> str:
    """The counted tensors of a step beside their prediction, or else the prediction alone."""
    parts = []
    if run.step_memory is not None:
        counted = run.step_memory.counted
        what = (
            f"{human_bytes(counted.peak)} of tensors in step {counted.step} ({counted.batch} × {counted.length} tokens)"
        )
        predicted = run.step_memory.predicted
        parts = [f"{what}, {human_bytes(predicted)} predicted for it" if predicted else what]
    if run.predicted is not None:
        parts.append(f"{human_bytes(run.predicted)} predicted with the longest rows")
    return "; ".join(parts) or "not predicted: the model's code does not run without values"


def _data(data: CardData) -> str:
    """The sources; of several, each with its rows and tokens."""
    if len(data.sources) > 1:
        return ", ".join(f"{public_name(name)} ({rows:,} rows, {n:,} tokens)" for name, rows, n in data.sources)
    return ", ".join(public_name(source) for source in paths(data.config.data.train))


def _described_task(config: Config) -> str:
    """The task, with the labels or the reward function."""
    if config.data.labels:
        return f"{config.task}; {len(config.data.labels)} labels: {', '.join(config.data.labels)}"
    if config.training.reward:
        return f"{config.task}; reward {config.training.reward.replace(chr(92), '/').rpartition('/')[2]}"
    return config.task


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation besides its loss."""
    found = {name: record.get(f"eval_{name}") for name in _SCORES}
    return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def _result(data: CardData) -> dict[str, str]:
    rows = {}
    if losses := [r for r in data.run.history if r.get("loss") is not None]:
        rows["training loss"] = _first_and_last(losses, "loss")
    if rewards := [r for r in data.run.history if isinstance(r.get("reward"), float)]:
        rows["mean reward"] = _first_and_last(rewards, "reward")
    if held_out := evaluations(data):
        first, kept = held_out
        before = f"{_loss(first['eval_loss'], data)} before training, " if first["step"] == 0 else ""
        rows["held-out loss"] = f"{before}{_loss(kept['eval_loss'], data)} at step {kept['step']}"
        for name, value in _scores(kept).items():
            earlier = f"{first[f'eval_{name}']:.4f} before training, " if first["step"] == 0 else ""
            rows[f"held-out {_SCORES[name]}"] = f"{earlier}{value:.4f} at step {kept['step']}"
    return rows


def _first_and_last(records: Sequence[Mapping[str, Any]], figure: str) -> str:
    """A figure at the first and at the last logged step, which need not be the last step of the run."""
    ends = records[:1] if len(records) == 1 else (records[0], records[-1])
    return ", ".join(f"{record[figure]:.4f} at step {record['step']}" for record in ends)


def evaluations(data: CardData) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first evaluation and that of the saved adapter: the best one if the run keeps it, else the last."""
    records = [r for r in data.run.history if r.get("eval_loss") is not None]
    if not records:
        return None
    rewarded = data.config.task == "grpo"  # whose loss is near zero at every reward
    best = min(records, key=lambda r: -r["eval_reward"] if rewarded else r["eval_loss"])
    return records[0], best if data.config.training.keeps_best else records[-1]


def _loss(value: float, data: CardData) -> str:
    return f"{value:.4f}" + (f" (perplexity {math.exp(value):.2f})" if _is_perplexity(value, data) else "")


def _is_perplexity(loss: float, data: CardData) -> bool:
    """Whether exp(loss) is a perplexity: true of a loss per token, not of DPO's."""
    return data.config.task == "sft" and loss < 50
