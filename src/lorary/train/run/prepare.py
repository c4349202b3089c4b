"""Everything about a run that can be known before the weights are read: rows, lint, plan, memory, steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.errors import ConfigError
from lorary.layers.rope import max_context, rotation
from lorary.model.loading.checkpoint_kind import reader
from lorary.model.loading.from_pretrained import dtype, load_config, load_tokenizer, skeleton
from lorary.model.plan import Plan
from lorary.train.config.config import Config
from lorary.train.config.conflicts import contradictions
from lorary.train.config.previous_tasks import past_of, with_digests
from lorary.train.data.lint import Lint, lint
from lorary.train.data.load import load
from lorary.train.data.tokenize import Tokens, tokenize
from lorary.train.run.memory_forecast import workload


@dataclass(frozen=True)
class RunPlan:
    """A run before its first step.

    Args:
        config: resolved.
        tokenizer: of the base, with the chat template of the run.
        train: the rows that are learnt.
        held_out: the rows that are not; None where there are none.
        lint: what the rows are like.
        plan: what will be attached.
        memory: what it will take.
        steps: optimizer steps.
        notes: what is worth knowing, of the configuration and the data.
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
    """Reads configuration, tokenizer and data, and plans; reads no weights and writes nothing.

    Args:
        config: of the run.
        processes: how many will train.

    Raises:
        LoraryError: whatever is wrong with the configuration, the method, the model or the data.
    """
    config = config.resolve()
    if problems := contradictions(config):
        raise ConfigError("the configuration contradicts itself:", problems)
    past = past_of(config.method.after)
    method = config.method.model_copy(update={"after": with_digests(config.method.after, past)})
    config = config.model_copy(update={"method": method})
    bare = skeleton(config.model)
    plan = config.method.plan(bare, past)
    reader(config.model.id, bare.config, plan.method.storage, None)  # refuses what is packed in another way
    tokenizer = load_tokenizer(config.model)
    data = load(config.data, config.task, config.training.seed)
    train = tokenize(data.train, tokenizer, config.data)
    held_out = tokenize(data.validation, tokenizer, config.data) if data.validation else None
    found = lint(train, tokenizer, bare.get_input_embeddings().num_embeddings, held_out)
    found.refuse()
    memory = _memory(config, bare, plan, found)
    notes = (*config.notes, *data.notes, *found.notes, *plan.notes, *_dtype_note(config))
    notes += _length_notes(config, bare.config.get_text_config(), plan, _longest(config, found))
    steps = _steps(config, train, processes)
    return RunPlan(config, tokenizer, train, held_out, found, plan, memory, steps, notes, tuple(past))


def replanned(prepared: RunPlan, plan: Plan) -> RunPlan:
    """The same run with another plan for the same model: what it will take, and its notes, are those of that plan."""
    memory = _memory(prepared.config, skeleton(prepared.config.model), plan, prepared.lint)
    notes = [note for note in prepared.notes if note not in prepared.plan.notes]
    return dataclasses.replace(prepared, plan=plan, memory=memory, notes=(*notes, *plan.notes))


def _memory(config: Config, bare: Any, plan: Plan, found: Lint) -> Memory:
    """For the longest row in every place of a batch."""
    import torch

    training = config.training
    paged = training.optimizer if torch.cuda.is_available() else training.optimizer.removeprefix("paged_")
    work = dataclasses.replace(
        workload(config, bare), length=_longest(config, found), labelled=found.labelled
    )  # on a CPU nothing is paged
    return predict(bare, plan, work, paged)


def _longest(config: Config, found: Lint) -> int:
    """Tokens of the longest row."""
    return config.data.max_length if config.data.packing else min(config.data.max_length, max(found.lengths.values()))


def _length_notes(config: Config, own: Any, plan: Plan, longest: int) -> tuple[str, ...]:
    """Rows and positions that do not fit each other: beyond what the model has learnt to tell apart, or far below."""
    length, known = plan.method.context.length if plan.method.context else None, max_context(own)
    if length is None and known is not None and longest > known and rotation(own) is not None:
        return (f"rows have up to {longest:,} tokens, and the model knows {known:,} positions: longlora extends them",)
    if length is not None and longest < length:
        return (f"the longest row has {longest:,} tokens: nothing is learnt about the {length:,} it is to read",)
    return ()


def _steps(config: Config, train: Tokens, processes: int) -> int:
    t, rows = config.training, len(train.rows)
    if t.max_steps is not None:
        return t.max_steps
    if config.data.packing:
        rows = _packed_rows(config, train)
    batches = math.ceil(rows / (t.batch_size * processes))
    return math.ceil((t.epochs or 1) * math.ceil(batches / t.gradient_accumulation_steps))


def _packed_rows(config: Config, train: Tokens) -> int:
    """How many rows are left after packing: TRL's own packing, on the lengths alone."""
    from datasets import Dataset
    from trl import pack_dataset

    lengths = [{"input_ids": [0] * len(row["input_ids"])} for row in train.rows]
    return len(pack_dataset(Dataset.from_list(lengths), config.data.max_length, "bfd"))


def _dtype_note(config: Config) -> list[str]:
    import torch

    own = load_config(config.model)
    saved, chosen = own.dtype, dtype(config.model, own)
    if config.model.dtype != "auto" or saved == chosen or not isinstance(saved, torch.dtype):
        return []
    name = str(saved).removeprefix("torch.")
    return [f"the weights are saved in {name} and compute in float32: this CPU has no {name} arithmetic"]
