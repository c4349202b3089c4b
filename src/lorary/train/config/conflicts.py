"""Contradictions between fields of a configuration, and outputs that would destroy something."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.files.home import expanded
from lorary.methods.lora_drop import sharing_problems
from lorary.spec.calibration import CalibratedInit
from lorary.spec.interfaces import Sequential
from lorary.spec.method import Method
from lorary.train.config.config import Config
from lorary.train.config.optimization_conflicts import optimization_problems
from lorary.train.config.sources import Source, paths
from lorary.train.config.tasks import ROWS, TASK_DEFAULTS, has_reference, wrong_format


def contradictions(config: Config) -> list[Diagnostic]:
    """Every contradiction; `where` is the dotted key to change."""
    return [problem for check in CHECKS for problem in check(config)]


def _unused(c: Config) -> Iterator[Diagnostic]:
    """Fields without effect."""
    if c.data.validation is not None and c.data.validation_split > 0:
        yield Diagnostic("data.validation_split", "has no effect beside `data.validation`", "keep one of the two")
    if c.data.seed is not None and not c.data.draws_rows:
        what = "has no effect: no rows are drawn, neither by `validation_split` nor by a weight"
        yield Diagnostic("data.seed", what, "remove it")
    for key in ("eval_steps", "early_stopping_patience", "keep_best"):
        if getattr(c.training, key) and c.data.validation is None and not c.data.validation_split:
            fix = "set data.validation or data.validation_split"
            yield Diagnostic(f"training.{key}", "has no effect without held-out data", fix)
    if c.training.epochs is not None and c.training.max_steps is not None:
        yield Diagnostic("training.epochs", "`epochs` and `max_steps` both set the length", "keep one of the two")
    if c.training.bf16 and c.model.dtype == "bfloat16":
        yield Diagnostic("training.bf16", "has no effect: weights in bfloat16 compute in bfloat16", "remove it")
    if c.training.bf16 and c.model.dtype == "float16":
        yield Diagnostic("training.bf16", "weights in float16 compute in float16", "keep one of the two")
    if c.training.keep_best and c.training.early_stopping_patience is not None:
        yield Diagnostic(
            "training.keep_best", "has no effect beside `early_stopping_patience`, which keeps the best", "remove it"
        )
    if len(c.training.report_to) > 1 and "none" in c.training.report_to:
        yield Diagnostic("training.report_to", "`none` cannot be combined with a tracker", "remove one of the two")


def _task(c: Config) -> Iterator[Diagnostic]:
    """Fields of other tasks."""
    if c.task not in ("sft", "classification") and c.training.label_smoothing:
        what = f"has no effect when task is `{c.task}`, whose loss is not a cross-entropy"
        yield Diagnostic("training.label_smoothing", what, "remove it")
    for key in dict.fromkeys(key for defaults in TASK_DEFAULTS.values() for key in defaults):
        owners = [task for task, defaults in TASK_DEFAULTS.items() if key in defaults]
        if c.task not in owners and getattr(c.training, key) is not None:
            what = f"has no effect when task is `{c.task}`"
            yield Diagnostic(f"training.{key}", what, f"remove it, or set task: {' or '.join(owners)}")
    if c.data.labels is not None and c.task != "classification":
        what = f"has no effect when task is `{c.task}`"
        yield Diagnostic("data.labels", what, "remove it, or set task: classification")
    if c.data.format != "auto" and (wrong := wrong_format(c.task, c.data.format)):
        yield Diagnostic("data.format", *wrong)
    if c.task == "sft":
        return
    yield from _reference(c)
    if c.data.packing:
        yield Diagnostic("data.packing", f"{ROWS[c.task]} are not packed", "remove it, or set task: sft")
    if c.data.loss != "auto":
        reasons = {"grpo": "the answers are sampled", "classification": "the loss is that of the labels"}
        reason = reasons.get(c.task, "the loss compares the answers")
        yield Diagnostic("data.loss", f"has no effect when task is `{c.task}`: {reason}", "remove it")
    if c.task == "kto" and c.training.batch_size < 2:
        what = "KTO compares the answers of a batch, and a batch of one has nothing to compare"
        yield Diagnostic("training.batch_size", what, "use 2 or more; gradient_accumulation_steps may be 1")
    if c.task == "grpo":
        yield from _grpo(c)


def _reference(c: Config) -> Iterator[Diagnostic]:
    """A choice of the reference without effect."""
    if c.training.reference is None or "reference" not in TASK_DEFAULTS.get(c.task, {}):
        return
    if not c.model.adapter:
        what = "has no effect without `model.adapter`: training starts at the base"
        yield Diagnostic("training.reference", what, "remove it")
    elif not has_reference(c.task, c.training.grpo_beta):
        what = "has no effect while `training.grpo_beta` is 0: GRPO then has no reference"
        yield Diagnostic("training.reference", what, "remove it, or set grpo_beta")


def _grpo(c: Config) -> Iterator[Diagnostic]:
    """Fields that do not fit the groups of answers."""
    t = c.training
    group = t.num_generations or TASK_DEFAULTS["grpo"]["num_generations"]
    if c.data.special_tokens == "escape":
        what = "has no effect when task is `grpo`, which encodes its prompts while it trains"
        yield Diagnostic("data.special_tokens", what, "use keep or refuse")
    if t.reward is None:
        what = "task `grpo` needs a reward function"
        yield Diagnostic("training.reward", what, "write one in a file and name it: rewards.py:function")
    if c.data.overlong in ("truncate", "split"):
        yield Diagnostic("data.overlong", "prompts cannot be cut: their end is the question", "use drop or error")
    if (rows := t.batch_size * t.gradient_accumulation_steps) % group:
        what = f"a step has {t.batch_size} x {t.gradient_accumulation_steps} = {rows} answers, in groups of {group}"
        yield Diagnostic("training.num_generations", what, "make batch_size a multiple of num_generations")
    if t.eval_batch_size is not None and t.eval_batch_size % group:
        what = f"{t.eval_batch_size} is not a multiple of num_generations ({group})"
        yield Diagnostic("training.eval_batch_size", what, f"use {group}")


def _sources(c: Config) -> Iterator[Diagnostic]:
    """Settings of single sources that contradict the rest."""
    for key, sources in (("data.train", c.data.train), ("data.validation", c.data.validation or ())):
        for source in sources:
            if not isinstance(source, Source):
                continue
            if source.weight != 1 and key == "data.validation":
                what = f"the weight {source.weight:g} of `{source.path}` has no effect on held-out rows"
                yield Diagnostic(key, what, "remove it, or set limit")
            if source.split and "#" in source.path and not os.path.exists(source.path):
                what = f"`{source.path}` and `split: {source.split}` both name a split"
                yield Diagnostic(key, what, "keep one of the two")
            if source.format not in (None, "auto") and (why := wrong_format(c.task, source.format)):
                yield Diagnostic(key, f"`{source.path}`: {why[0]}", why[1])


def _streaming(c: Config) -> Iterator[Diagnostic]:
    """Settings that need all rows at once."""
    if not c.data.streaming:
        return
    if c.task not in ("sft", "dpo"):
        yield Diagnostic("data.streaming", f"task `{c.task}` reads all rows before training", "remove it")
    if c.training.max_steps is None:
        what, fix = "a stream has no known length, so it has no epochs", "set training.max_steps"
        yield Diagnostic("training.epochs" if c.training.epochs is not None else "data.streaming", what, fix)
    if c.data.validation_split:
        what = "a share of a stream cannot be held out: its length is not known"
        yield Diagnostic("data.validation_split", what, "set data.validation")
    if c.data.overlong in ("auto", "error"):
        what = "a stream cannot be searched for overlong rows before training, and the first one would end the run"
        fix = "set data.overlong: drop or truncate, or split for plain text"
        yield Diagnostic("data.overlong" if c.data.overlong == "error" else "data.streaming", what, fix)
    if c.data.packing:
        yield Diagnostic("data.packing", "the rows of a stream are not packed", "set one of the two to false")
    if c.method.drop is not None:
        yield Diagnostic("method.drop", "the probe draws from all rows, and a stream is never read whole", "remove it")


def _steps(c: Config) -> Iterator[Diagnostic]:
    """Step counts that do not fit together."""
    t = c.training
    if t.warmup >= 1 and t.warmup != int(t.warmup):
        what = f"a value of 1 or more is a number of steps, and {t.warmup:g} is not a whole number"
        yield Diagnostic("training.warmup", what, "0.03 is three percent of the steps")
    if t.max_steps is not None and t.warmup > t.max_steps:
        what = f"{t.warmup:g} warmup steps, but the run ends after {t.max_steps}"
        yield Diagnostic("training.warmup", what, "a value below 1 is a share of the steps")
    if t.keeps_best and t.eval_steps is not None and t.save_steps is not None and t.save_steps % t.eval_steps:
        what = f"{t.save_steps} is not a multiple of eval_steps ({t.eval_steps}), so checkpoints would miss evaluations"
        fix = "leave save_steps empty: it follows eval_steps"
        yield Diagnostic("training.save_steps", what, fix)


def _method(c: Config) -> Iterator[Diagnostic]:
    """Sections that the method cannot use."""
    if c.model.adapter:
        yield from _beside_an_adapter(c)
        return
    try:
        method, others = c.method.build(), [part.build() for part in c.method.also]
    except MethodError:  # reported at the method's own keys
        return
    if c.method.also and c.method.targets is None:
        yield Diagnostic("method.targets", "must be said beside `method.also`: which layers are left for this method?")
    named = [c.method.targets, *(part.targets for part in c.method.also)]
    for i, part in enumerate(c.method.also):
        if part.targets in named[: i + 1]:
            yield Diagnostic("method.also", f"names `{', '.join(part.targets)}` again", "each layer has one method")
    if c.method.drop is not None:
        for problem in deduplicated(p for one in (method, *others) for p in sharing_problems(one)):
            yield Diagnostic("method.drop", problem.what, problem.fix)
    yield from _unreadable_rows(c, (method, *others))
    if c.method.after and not any(isinstance(one.delta, Sequential) for one in (method, *others)):
        what = f"`{', '.join(c.method.name)}` cannot continue from earlier tasks"
        yield Diagnostic("method.after", what, "set method.name: o-lora")
    length = method.context.length if method.context is not None else None
    if length is not None and c.data.max_length > length:
        what = f"rows of up to {c.data.max_length:,} tokens, but the method extends the context to {length:,}"
        yield Diagnostic("data.max_length", what, f"set method.options: {{length: {c.data.max_length}}}")


def _unreadable_rows(c: Config, methods: Iterable[Method]) -> Iterator[Diagnostic]:
    """Inits that read training data, where no row of it is what the model alone reads."""
    if c.task in ("sft", "classification"):
        return
    for init in dict.fromkeys(method.init for method in methods):
        if isinstance(init, CalibratedInit):
            what = f"{type(init).__name__} reads rows that have labels, and {ROWS[c.task]} have none by themselves"
            yield Diagnostic("method.name", what, "use another start, or train an sft adapter first (model.adapter)")


def _beside_an_adapter(c: Config) -> Iterator[Diagnostic]:
    """Sections that choose layers, which an adapter to go on from has chosen already."""
    fix = "leave it out: training goes on with the adapter's own"
    for key in ("exclude", "ranks", "alphas", "experts", "also"):
        if getattr(c.method, key):
            yield Diagnostic(f"method.{key}", "has no effect beside `model.adapter`, which has its layers", fix)
    if c.method.options and "name" not in c.method.model_fields_set:
        yield Diagnostic("method.options", "has no effect without `method.name`", "leave both out")
    if c.method.after:
        what = "starts a new task beside those adapters, and `model.adapter` goes on with one"
        yield Diagnostic("method.after", what, "keep one of the two")
    if c.method.drop is not None:
        yield Diagnostic("method.drop", "probes for layers, and `model.adapter` has chosen them", "leave it out")


def _output(c: Config) -> Iterator[Diagnostic]:
    """An output folder that contains, or is, something that must not be overwritten."""
    if "\0" in c.output:
        yield Diagnostic("output", "contains a NUL character")
        return
    output = expanded(c.output).absolute()
    if output in (Path("/"), Path.home(), Path.cwd()):
        what = f"`{c.output}` is the root, home or working folder"
        yield Diagnostic("output", what, "name a folder of its own, such as runs/first")
        return
    inputs = {
        "the base model": (c.model.id,),
        "the training data": paths(c.data.train),
        "the validation data": paths(c.data.validation),
        "the adapter of an earlier task": c.method.after,
        "the adapter to go on from": (c.model.adapter,) if c.model.adapter else (),
    }
    for what, sources in inputs.items():
        for source in sources:
            path = Path(source.partition("#")[0]).absolute()
            if os.path.exists(path) and output in (path, *path.parents):
                yield Diagnostic("output", f"`{c.output}` contains {what} (`{source}`)", "name another folder")
                return


CHECKS = (_unused, _task, _sources, _streaming, _steps, optimization_problems, _method, _output)
