"""Contradictions between fields of a configuration, and outputs that would destroy something."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lorary.errors import Diagnostic, MethodError
from lorary.methods.lora_drop import sharing_problems
from lorary.spec.interfaces import Sequential
from lorary.train.config.config import Config
from lorary.train.config.optimization_conflicts import optimization_problems


def contradictions(config: Config) -> list[Diagnostic]:
    """Every contradiction; `where` is the dotted key to change."""
    return [problem for check in CHECKS for problem in check(config)]


def _unused(c: Config) -> Iterator[Diagnostic]:
    """Fields without effect."""
    if c.data.validation is not None and c.data.validation_split > 0:
        yield Diagnostic("data.validation_split", "has no effect beside `data.validation`", "keep one of the two")
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
    """Fields of the other task."""
    if c.task != "sft" and c.training.label_smoothing:
        what = f"has no effect when task is `{c.task}`: it smooths next-token targets"
        yield Diagnostic("training.label_smoothing", what, "remove it")
    if c.task == "sft":
        if c.training.dpo_beta is not None:
            yield Diagnostic("training.dpo_beta", "has no effect when task is `sft`", "remove it, or set task: dpo")
        if c.data.format == "preference":
            what = "task `sft` does not train on preference pairs"
            yield Diagnostic("data.format", what, "set task: dpo, or map the answer with data.columns")
        return
    if c.data.packing:
        yield Diagnostic("data.packing", "preference pairs are not packed", "remove it, or set task: sft")
    if c.data.loss != "auto":
        yield Diagnostic("data.loss", "has no effect when task is `dpo`: the loss compares the answers", "remove it")
    if c.data.format not in ("auto", "preference"):
        what = f"task `dpo` trains on preference pairs, not `{c.data.format}`"
        yield Diagnostic("data.format", what, "use `preference` or task: sft")


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
    try:
        method = c.method.build()
    except MethodError:  # reported at the method's own keys
        return
    if c.method.drop is not None:
        for problem in sharing_problems(method):
            yield Diagnostic("method.drop", problem.what, problem.fix)
    if c.method.after and not isinstance(method.delta, Sequential):
        what = f"`{', '.join(c.method.name)}` cannot continue from earlier tasks"
        yield Diagnostic("method.after", what, "set method.name: o-lora")
    length = method.context.length if method.context is not None else None
    if length is not None and c.data.max_length > length:
        what = f"rows of up to {c.data.max_length:,} tokens, but the method extends the context to {length:,}"
        yield Diagnostic("data.max_length", what, f"set method.options: {{length: {c.data.max_length}}}")


def _output(c: Config) -> Iterator[Diagnostic]:
    """An output folder that contains, or is, something that must not be overwritten."""
    if "\0" in c.output:
        yield Diagnostic("output", "contains a NUL character")
        return
    output = Path(c.output).expanduser().absolute()
    if output in (Path("/"), Path.home(), Path.cwd()):
        what = f"`{c.output}` is the root, home or working folder"
        yield Diagnostic("output", what, "name a folder of its own, such as runs/first")
        return
    inputs = {
        "the base model": (c.model.id,),
        "the training data": c.data.train,
        "the validation data": c.data.validation or (),
        "the adapter of an earlier task": c.method.after,
    }
    for what, sources in inputs.items():
        for source in sources:
            path = Path(source.partition("#")[0]).absolute()
            if os.path.exists(path) and output in (path, *path.parents):
                yield Diagnostic("output", f"`{c.output}` contains {what} (`{source}`)", "name another folder")
                return


CHECKS = (_unused, _task, _steps, optimization_problems, _method, _output)
