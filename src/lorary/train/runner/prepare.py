"""Everything about a run before its weights are read: rows, lint, plan, memory, steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from lorary.adapters.adapter import Adapter
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.errors import ConfigError
from lorary.layers.rope import max_context, rope_parameters
from lorary.model.loading.checkpoint_kind import reader
from lorary.model.loading.from_pretrained import load_config, load_dtype, load_tokenizer, skeleton
from lorary.model.plan import Plan
from lorary.train.config.config import Config
from lorary.train.config.conflicts import contradictions
from lorary.train.config.previous_tasks import load_previous_tasks, with_digests
from lorary.train.data.lint import Lint, lint
from lorary.train.data.load import load
from lorary.train.data.tokenize import Tokens, tokenize
from lorary.train.runner.memory_forecast import workload


@dataclass(frozen=True)
class RunPlan:
    """A run before its first step.

    Args:
        config: resolved.
        tokenizer: of the base, with the chat template of the run.
        train: the training rows.
        held_out: the held-out rows, if any.
        lint: statistics of the rows, and their problems.
        plan: of the method on the base.
        memory: the prediction.
        steps: optimizer steps.
        notes: about the configuration and the data.
        past: the adapters of earlier tasks.
    """

    config: Config
    tokenizer: Any
    train: Tokens
    held_out: Tokens | None
    lint: Lint
    plan: Plan
    memory: Memory
    steps: int
    notes: tuple[str, ...]
    past: tuple[Adapter, ...] = ()


def prepare(config: Config, *, processes: int = 1) -> RunPlan:
    """The plan of a run, from its configuration, tokenizer and data; it reads no weights and writes nothing.

    Args:
        config: of the run.
        processes: the number of training processes.

    Raises:
        LoraryError: the configuration, the method, the model or the data cannot be used, with every reason.
    """
    config = config.resolve()
    if problems := contradictions(config):
        raise ConfigError("the configuration contradicts itself:", problems)
    past = load_previous_tasks(config.method.after)
    method = config.method.model_copy(update={"after": with_digests(config.method.after, past)})
    config = config.model_copy(update={"method": method})
    model = skeleton(config.model)
    plan = config.method.plan(model, past)
    reader(config.model.id, model.config, plan.method.storage, None)  # refuses other quantisations
    tokenizer = load_tokenizer(config.model)
    data = load(config.data, config.task, config.training.seed)
    train = tokenize(data.train, tokenizer, config.data)
    held_out = tokenize(data.validation, tokenizer, config.data) if data.validation else None
    report = lint(train, tokenizer, model.get_input_embeddings().num_embeddings, held_out)
    report.refuse()
    memory = _memory(config, model, plan, report)
    notes = (*config.notes, *data.notes, *report.notes, *plan.notes, *_dtype_note(config))
    notes += _length_notes(model.config.get_text_config(), plan, _longest(config, report))
    steps = _count_steps(config, train, processes)
    return RunPlan(config, tokenizer, train, held_out, report, plan, memory, steps, notes, tuple(past))


def with_plan(prepared: RunPlan, plan: Plan) -> RunPlan:
    """The same run with another plan for its model, and with the memory and the notes of that plan."""
    memory = _memory(prepared.config, skeleton(prepared.config.model), plan, prepared.lint)
    notes = [note for note in prepared.notes if note not in prepared.plan.notes]
    return dataclasses.replace(prepared, plan=plan, memory=memory, notes=(*notes, *plan.notes))


def _memory(config: Config, model: Any, plan: Plan, report: Lint) -> Memory:
    """The memory of batches in which every row is as long as the longest."""
    batch = dataclasses.replace(workload(config, model), length=_longest(config, report), labelled=report.labelled)
    optimizer = config.training.optimizer
    paged = torch.cuda.is_available()  # a CPU has nothing to page
    return predict(model, plan, batch, optimizer if paged else optimizer.removeprefix("paged_"))


def _longest(config: Config, report: Lint) -> int:
    """Tokens of the longest row."""
    return config.data.max_length if config.data.packing else min(config.data.max_length, max(report.lengths.values()))


def _length_notes(model_config: Any, plan: Plan, longest: int) -> tuple[str, ...]:
    """Notes on rows that are longer than the model's context, or too short to train an extended one."""
    length, known = plan.method.context.length if plan.method.context else None, max_context(model_config)
    if length is None and known is not None and longest > known and rope_parameters(model_config) is not None:
        return (f"rows have up to {longest:,} tokens, and the model knows {known:,} positions: longlora extends them",)
    if length is not None and longest < length:
        return (f"the longest row has {longest:,} tokens: training covers only these of the {length:,} positions",)
    return ()


def _count_steps(config: Config, train: Tokens, processes: int) -> int:
    t, rows = config.training, len(train.rows)
    if t.max_steps is not None:
        return t.max_steps
    if config.data.packing:  # TRL's own packing, on the lengths alone
        from datasets import Dataset  # both take seconds to import
        from trl import pack_dataset

        lengths = [{"input_ids": [0] * len(row["input_ids"])} for row in train.rows]
        rows = len(pack_dataset(Dataset.from_list(lengths), config.data.max_length, "bfd"))
    batches = math.ceil(rows / (t.batch_size * processes))
    return math.ceil((t.epochs or 1) * math.ceil(batches / t.gradient_accumulation_steps))


def _dtype_note(config: Config) -> list[str]:
    model_config = load_config(config.model)
    saved, chosen = model_config.dtype, load_dtype(config.model, model_config)
    if config.model.dtype != "auto" or saved == chosen or not isinstance(saved, torch.dtype):
        return []
    name = str(saved).removeprefix("torch.")
    return [f"the weights are saved in {name} and compute in float32: this CPU has no {name} arithmetic"]
