"""The facts behind an advice: the size and family of the model, the rows and their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lorary.errors import ConfigError, Diagnostic
from lorary.layers.rope import max_context, rope_parameters
from lorary.model.loading.dtype import load_dtype
from lorary.model.loading.from_pretrained import load_config, load_tokenizer, skeleton
from lorary.model.loading.model_class import check_task
from lorary.model.plan import Plan
from lorary.train.config.config import Config
from lorary.train.config.sources import as_source
from lorary.train.config.tasks import wrong_format
from lorary.train.data.lint import Lint, lint
from lorary.train.data.load import Data, load
from lorary.train.data.row_formats import Text
from lorary.train.data.tokenize import Row, Tokens, token_ids, tokenize
from lorary.train.runner.memory_forecast import learned_positions
from lorary.train.runner.task_base import base_of_task, new_modules, with_labels

TASKS = ("sft", "dpo", "kto", "classification")  # in the order in which they are tried for a format
_LONGEST = 10_000_000  # tokens: nothing is cut before its length is known
_HEADLINE = "cannot advise:"


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Args:
        task: of the run.
        family: the model's type, as Transformers names it.
        hidden: its hidden size.
        parameters: its size.
        context: the tokens that it reads; None if unlimited or unknown.
        scalable: whether RoPE scaling can extend its context.
        dtype: the precision of the saved weights.
        computes: the precision in which they compute here.
        per_rank: numbers that one unit of rank trains over all adapted layers.
        weights: numbers of the adapted weight matrices.
        rows: training rows, before they are cut.
        unique: how many of them are different.
        lengths: their tokens, in their order.
        held_out_lengths: the tokens of the held-out rows.
        answers: tokens in the loss; 0 for a task without answers.
        plain: whether the rows are plain text, which is split and not cut.
    """

    task: str
    family: str
    hidden: int
    parameters: int
    context: int | None
    scalable: bool
    dtype: str
    computes: str
    per_rank: int
    weights: int
    rows: int
    unique: int
    lengths: tuple[int, ...] = field(repr=False)
    answers: int
    plain: bool
    held_out_lengths: tuple[int, ...] = field(default=(), repr=False)

    @property
    def held_out(self) -> int:
        """The number of held-out rows."""
        return len(self.held_out_lengths)

    @cached_property
    def ordered(self) -> list[int]:
        """The lengths of all rows, those held out included, which `max_length` must hold as well."""
        return sorted((*self.lengths, *self.held_out_lengths))

    def percentile(self, percent: int) -> int:
        """The smallest length that at least so many percent of all rows do not exceed."""
        return self.ordered[max(-(-percent * len(self.ordered) // 100) - 1, 0)]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.ordered[-1]

    def to_dict(self) -> dict[str, Any]:
        """The facts in JSON types; of the lengths, percentiles."""
        found = {key: value for key, value in dataclasses.asdict(self).items() if not key.endswith("lengths")}
        return (
            found
            | {"held_out": self.held_out}
            | {"tokens_per_row": {str(p): self.percentile(p) for p in (50, 90, 99, 100)}}
        )


@dataclass(frozen=True)
class Subject:
    """A model and its data, read for an advice.

    Args:
        config: of the run, with its task and labels.
        model: the base on the meta device.
        plan: of the method for a configuration.
        rows: the tokenized training rows.
        padding: the token that pads.
        notes: of the data.
        facts: about both.
    """

    config: Config
    model: Any
    plan: Callable[[Config], Plan]
    rows: tuple[Row, ...]
    padding: int
    notes: tuple[str, ...]
    facts: Facts


def read(config: Config) -> Subject:
    """The model without its weights, and the rows of a configuration.

    Raises:
        LoraryError: the model or the data cannot be used, with every reason.
    """
    _refuse(config)
    data, config = _data_and_task(_with_own_validation(config))
    check_task(config.model, load_config(config.model), config.task)
    tokenizer = load_tokenizer(config.model)
    config, labels = with_labels(config, data)
    base = base_of_task(config, labels, tokenizer)
    model = skeleton(config.model, base)
    new = new_modules(config, base, model)

    def planned(changed: Config) -> Plan:
        return changed.plan(model, (), new)

    whole = config.data.model_copy(update={"max_length": _LONGEST, "overlong": "auto"})
    train = tokenize(data.train, tokenizer, whole, data.copies, data.sources, labels=labels)
    held_out = tokenize(data.validation, tokenizer, whole, labels=labels) if data.validation else None
    found = lint(train, tokenizer, model.get_input_embeddings().num_embeddings, held_out)
    found.refuse()
    facts = _facts(config, model, planned(config), data, train, found)
    facts = dataclasses.replace(facts, held_out_lengths=held_out.lengths if held_out else ())
    notes = (*config.notes, *data.notes, *found.notes)
    return Subject(config, model, planned, train.rows, tokenizer.pad_token_id or 0, notes, facts)


def _refuse(config: Config) -> None:
    """Refuse a run that brings its own answers, or whose rows are not to be read at once.

    Raises:
        ConfigError: every reason.
    """
    problems = []
    if config.model.adapter:
        what = f"training goes on from `{config.model.adapter}`, which brings its method, ranks and targets"
        problems.append(Diagnostic("model.adapter", what, "leave it out: advice is for a new adapter"))
    if config.data.streaming:
        what = "the lengths and the number of rows decide, and a stream's are not known"
        problems.append(Diagnostic("data.streaming", what, "name a file with a part of the rows"))
    if "task" in config.model_fields_set and config.task not in TASKS:
        what = f"there is no advice for task `{config.task}`"
        problems.append(Diagnostic("task", what, f"advice is for {', '.join(TASKS)}"))
    if problems:
        raise ConfigError(_HEADLINE, problems)


def _with_own_validation(config: Config) -> Config:
    """The configuration with the held-out half of built-in sets, if it names no held-out rows."""
    paths = [as_source(source).path.partition("#")[0] for source in config.data.train]
    if config.data.validation or config.data.validation_split or not all(p.startswith("builtin:") for p in paths):
        return config
    own = {"validation": tuple(dict.fromkeys(paths))}
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def _data_and_task(config: Config) -> tuple[Data, Config]:
    """The rows, and the configuration with the task that trains on them, if it names none.

    Raises:
        ConfigError: no task that is advised on trains on such rows.
    """
    if "task" in config.model_fields_set:
        return load(config.data, config.task, config.training.seed), config
    data = load(config.data, None, config.training.seed)
    formats = data.format.split(", ")
    task = next((t for t in TASKS if not any(wrong_format(t, one) for one in formats)), None)
    if task is None:
        what = f"rows of the format {data.format} belong to no task that advice knows ({', '.join(TASKS)})"
        raise ConfigError(_HEADLINE, [Diagnostic("data.train", what, "set task, or data.format")])
    return data, config.model_copy(update={"task": task})


def _facts(config: Config, model: Any, planned: Plan, data: Data, train: Tokens, found: Lint) -> Facts:
    text = model.config.get_text_config()
    ids = [tuple(token_ids(row)) for row in train.rows]
    saved = getattr(load_config(config.model), "dtype", None) or torch.float32
    contexts = [n for n in (max_context(text), learned_positions(model)) if n is not None]
    return Facts(
        task=config.task,
        family=str(text.model_type),
        hidden=int(text.hidden_size),
        parameters=planned.total,
        context=min(contexts, default=None),
        scalable=rope_parameters(text) is not None,
        dtype=_name(saved),
        computes=_name(load_dtype(config.model, load_config(config.model))),
        per_rank=sum(max(s.site.adapters, 1) * (s.site.out_features + s.site.in_features) for s in planned.sites),
        weights=sum(s.site.numbers for s in planned.sites),
        rows=len(ids),
        unique=len(set(ids)) + train.copies,
        lengths=train.lengths,
        answers=round(found.labelled * sum(map(len, ids))) if train.has_answers else 0,
        plain=all(isinstance(example, Text) for example in data.train),
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
