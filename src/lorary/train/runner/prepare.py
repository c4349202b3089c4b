"""Everything about a run before its weights are read: rows, lint, plan, memory, steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.errors import ConfigError, DataError, Diagnostic, independent
from lorary.layers.rope import max_context, rope_parameters
from lorary.methods.alora import invocation_of, with_invocation
from lorary.methods.prompt_tuning import with_prompt_text
from lorary.model.loading.checkpoint_kind import reader
from lorary.model.loading.from_pretrained import load_config, load_tokenizer, skeleton
from lorary.model.loading.model_class import check_task
from lorary.model.loading.source import ModelClass
from lorary.model.plan import Plan
from lorary.model.vocabulary import added_tokens
from lorary.spec.method import Method
from lorary.spec.presets import presets_of
from lorary.train.config.config import Config
from lorary.train.config.conflicts import contradictions
from lorary.train.config.previous_tasks import load_previous_tasks, path_of, with_digests
from lorary.train.config.starting_adapter import Start, load_start, plan_to_go_on
from lorary.train.data.invocation import invocation_notes
from lorary.train.data.labels import label_notes
from lorary.train.data.lint import Lint, lint
from lorary.train.data.load import Data, load, load_validation
from lorary.train.data.stream import RowStream
from lorary.train.data.task_rows import Labels
from lorary.train.data.tokenize import Tokens, tokenize
from lorary.train.runner.memory_forecast import dtype_notes, learned_positions, workload
from lorary.train.runner.step_forecast import optimizer_of
from lorary.train.runner.task_base import base_of_task, fit_positions, new_modules, with_labels
from lorary.train.runner.trackers import require_trackers
from lorary.train.trainer.reward_function import Reward, load_reward


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
        base: the class and configuration to load the model with; None for a causal language model.
        labels: of a classification.
        reward: of GRPO.
        start: the adapter to go on from.
        stream: the training rows if they are read while training; `train` are then the first of them.
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
    base: ModelClass | None = None
    labels: Labels | None = None
    reward: Reward | None = None
    start: Adapter | None = None
    stream: RowStream | None = None


def prepare(config: Config, *, processes: int = 1) -> RunPlan:
    """The plan of a run, from its configuration, tokenizer and data; it reads no weights and writes nothing.

    Args:
        config: of the run.
        processes: the number of training processes.

    Raises:
        LoraryError: the configuration, the method, the model or the data cannot be used, with every reason.
    """
    if problems := contradictions(config.resolve()):
        raise ConfigError("the configuration contradicts itself:", problems)
    require_trackers(config.training.report_to)
    start, past = load_start(config), load_previous_tasks(config.method.after)
    config = _identified(config.resolve(presets_of(start.adapter.method) if start else ()), start, past)
    check_task(config.model, load_config(config.model), config.task)
    tokenizer = load_tokenizer(config.model)
    reward = load_reward(config.training.reward) if config.training.reward else None
    planned, data = _planned_and_data(config, tokenizer, start, past)
    config, model, plan = planned.config, planned.model, planned.plan
    train, held_out, data_notes, stream = _rows(config, tokenizer, data, planned.labels)
    if reward is not None:
        reward.check(set(train.rows[0]) - {"prompt", "prompt_ids"} if train.rows else set())
    report = lint(train, tokenizer, model.get_input_embeddings().num_embeddings, held_out)
    report.refuse()
    _refuse_rows_beyond_positions(model, plan, _longest(config, report))
    memory = _memory(config, model, plan, report)
    notes = (*config.notes, *data_notes, *report.notes, *plan.notes, *dtype_notes(config))
    notes += tuple(label_notes(planned.labels)) if planned.labels else ()
    notes += tuple(invocation_notes(invocation_of(plan.method), train, held_out, tokenizer))
    notes += _length_notes(model.config.get_text_config(), plan, _longest(config, report))
    steps = _count_steps(config, train, processes)
    config = config.with_absolute_paths()
    return RunPlan(
        config,
        tokenizer,
        train,
        held_out,
        report,
        plan,
        memory,
        steps,
        notes,
        past=tuple(past),
        base=planned.base,
        labels=planned.labels,
        reward=reward,
        start=start.adapter if start else None,
        stream=stream,
    )


@dataclass(frozen=True)
class _Planned:
    """A base on the meta device with the plan for it."""

    config: Config
    labels: Labels | None
    base: ModelClass | None
    model: Any
    plan: Plan


def _planned_and_data(
    config: Config, tokenizer: Any, start: Start | None, past: Sequence[Adapter]
) -> tuple[_Planned, Data | None]:
    """The plan and the data, None if it is streamed; if both are impossible, every reason."""

    def read() -> Data | None:
        return None if config.data.streaming else load(config.data, config.task, config.training.seed)

    if config.task != "classification":
        return independent(lambda: _planned(config, None, tokenizer, start, past), read)
    data = read()  # the head has an output for each of its labels
    labelled, labels = with_labels(config, data) if data else (config, None)
    return _planned(labelled, labels, tokenizer, start, past), data


def _planned(
    config: Config, labels: Labels | None, tokenizer: Any, start: Start | None, past: Sequence[Adapter]
) -> _Planned:
    base = base_of_task(config, labels, tokenizer)
    model = skeleton(config.model, base)
    config = fit_positions(config, model)
    if start is not None:
        plan = plan_to_go_on(config, model, start.adapter, base.fresh if base else ())
    else:
        plan = _with_texts(config.plan(model, past, new_modules(config, base, model)), tokenizer)
    reader(config.model.id, model.config, plan.method.storage, None)  # refuses other quantisations
    return _Planned(config, labels, base, model, plan)


def _with_texts(plan: Plan, tokenizer: Any) -> Plan:
    """The plan with the token ids of the texts that a prompt starts at, or that invoke the adapter."""

    def tokenized(method: Method) -> Method:
        return with_invocation(with_prompt_text(method, tokenizer), tokenizer)

    sites = tuple(dataclasses.replace(p, method=tokenized(p.method)) for p in plan.sites)
    return dataclasses.replace(plan, method=tokenized(plan.method), sites=sites)


def _identified(config: Config, start: Start | None, past: list[Adapter]) -> Config:
    """The configuration with the digests of the adapters that it names."""
    if start is not None:
        names = ", ".join(presets_of(start.adapter.method))
        note = f"training goes on from the adapter in {path_of(start.name)}: {names}"
        tokens = config.model.tokens or tuple(added_tokens(start.adapter.sites))
        model = config.model.model_copy(update={"adapter": start.name, "tokens": tokens})
        config = config.model_copy(update={"model": model})
        return config.with_notes(note, *start.adapter.notes)
    method = config.method.model_copy(update={"after": with_digests(config.method.after, past)})
    return config.model_copy(update={"method": method})


def _rows(
    config: Config, tokenizer: Any, data: Data | None, labels: Labels | None
) -> tuple[Tokens, Tokens | None, tuple[str, ...], RowStream | None]:
    """(training rows, held-out rows, notes on the data, the stream of the training rows if they are streamed)."""
    section = config.data
    if data is None:
        stream = RowStream(section, tokenizer, config.task, config.training.order_seed)
        examples = load_validation(section, config.task)
        held_out = tokenize(examples, tokenizer, section) if examples else None
        return stream.head, held_out, stream.notes, stream
    held_out = tokenize(data.validation, tokenizer, section, labels=labels) if data.validation else None
    train = tokenize(data.train, tokenizer, section, data.copies, data.sources, labels=labels)
    return train, held_out, data.notes, None


def with_plan(prepared: RunPlan, plan: Plan) -> RunPlan:
    """The same run with another plan for its model, and with the memory and the notes of that plan."""
    memory = _memory(prepared.config, skeleton(prepared.config.model, prepared.base), plan, prepared.lint)
    notes = [note for note in prepared.notes if note not in prepared.plan.notes]
    return dataclasses.replace(prepared, plan=plan, memory=memory, notes=(*notes, *plan.notes))


def _memory(config: Config, model: Any, plan: Plan, report: Lint) -> Memory:
    """The memory of batches in which every row is as long as the longest."""
    length = _longest(config, report)
    labelled = report.labelled if report.has_answers else 1.0
    if answer := config.training.max_completion_length:
        length, labelled = length + answer, answer / (length + answer)
    batch = dataclasses.replace(workload(config, model), length=length, labelled=labelled)
    return predict(model, plan, batch, optimizer_of(config))


def _longest(config: Config, report: Lint) -> int:
    """Tokens of the longest row."""
    whole = config.data.packing or config.data.streaming
    return config.data.max_length if whole else min(config.data.max_length, max(report.lengths.values()))


def _refuse_rows_beyond_positions(model: Any, plan: Plan, longest: int) -> None:
    """Refuse rows that do not fit into a table of positions beside what stands before the text.

    Raises:
        DataError: the longest row does not.
    """
    taken, room = plan.method.context.taken if plan.method.context else 0, learned_positions(model)
    if taken and room is not None and longest + taken > room:
        what = f"rows have up to {longest:,} tokens, and {room - taken:,} of {room:,} positions are left for the text"
        problem = Diagnostic("data.max_length", what, f"set data.max_length: {room - taken}")
        raise DataError("the rows are too long:", [problem])


def _length_notes(model_config: Any, plan: Plan, longest: int) -> tuple[str, ...]:
    """Notes on rows that are longer than the model's context, or too short to train an extended one."""
    context, known = plan.method.context, max_context(model_config)
    length, known = (None, known) if context is None else (context.length, known and known - context.taken)
    if length is None and known is not None and longest > known and rope_parameters(model_config) is not None:
        return (f"rows have up to {longest:,} tokens, and the model knows {known:,} positions: longlora extends them",)
    if length is not None and longest < length:
        return (f"the longest row has {longest:,} tokens: training covers only these of the {length:,} positions",)
    return ()


def _count_steps(config: Config, train: Tokens, processes: int) -> int:
    t, rows = config.training, len(train.rows)
    if t.max_steps is not None and config.task != "grpo":
        return t.max_steps
    if config.data.packing:  # TRL's own packing, on the lengths alone
        from datasets import Dataset  # both take seconds to import
        from trl import pack_dataset

        lengths = [{"input_ids": [0] * len(row["input_ids"])} for row in train.rows]
        rows = len(pack_dataset(Dataset.from_list(lengths), config.data.max_length, "bfd"))
    if config.task == "grpo":
        return _grpo_steps(config, rows, processes)
    batches = math.ceil(rows / (t.batch_size * processes))
    return math.ceil((t.epochs or 1) * math.ceil(batches / t.gradient_accumulation_steps))


def _grpo_steps(config: Config, prompts: int, processes: int) -> int:
    """Optimizer steps of GRPO, which takes the prompts of a whole step at once.

    Raises:
        DataError: there are too few for one.
    """
    t = config.training
    each = t.batch_size * t.gradient_accumulation_steps * processes // (t.num_generations or 1)
    if prompts < each:
        what = f"there are {prompts:,} prompts, and a step takes {each:,}"
        fix = "lower training.batch_size or gradient_accumulation_steps, or raise num_generations"
        raise DataError("too few prompts:", [Diagnostic("data.train", what, fix)])
    return t.max_steps or math.ceil((t.epochs or 1) * (prompts // each))
