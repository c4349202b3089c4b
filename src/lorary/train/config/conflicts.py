"""Fields of a configuration that cannot be obeyed together, or whose obedience would destroy something."""

from __future__ import annotations

import os
from pathlib import Path

from lorary.errors import Diagnostic, MethodError
from lorary.train.config.config import Config

Found = list[tuple[str, Diagnostic]]


def contradictions(config: Config) -> Found:
    """Every one: (the key to point at, the problem)."""
    return [*_unused(config), *_steps(config), *_drop(config), *_after(config), *_length(config), *_paths(config)]


def _unused(c: Config) -> Found:
    """Fields that would have no effect."""
    found: Found = []
    held_out = c.data.validation is not None or c.data.validation_split > 0

    def refuse(key: str, what: str, fix: str) -> None:
        found.append((key, Diagnostic("", what, fix)))

    if c.data.validation is not None and c.data.validation_split > 0:
        refuse("data.validation_split", "has no effect beside `data.validation`", "keep one of the two")
    for key in ("eval_steps", "early_stopping_patience", "keep_best"):
        if getattr(c.training, key) not in (None, False) and not held_out:
            refuse(
                f"training.{key}",
                "has no effect without held-out data",
                "set data.validation or data.validation_split",
            )
    if c.training.epochs is not None and c.training.max_steps is not None:
        refuse("training.epochs", "`epochs` and `max_steps` both say when to stop", "keep one of the two")
    if c.training.bf16 and c.model.dtype == "bfloat16":
        refuse("training.bf16", "has no effect: weights in bfloat16 compute in bfloat16", "remove it")
    if c.training.bf16 and c.model.dtype == "float16":
        refuse("training.bf16", "the weights are in float16, and compute in it", "keep one of the two")
    if c.training.keep_best and c.training.early_stopping_patience is not None:
        refuse("training.keep_best", "`early_stopping_patience` keeps the best anyhow", "remove it")
    if c.task == "sft" and c.training.dpo_beta is not None:
        refuse("training.dpo_beta", "has no effect when task is `sft`", "remove it, or set task: dpo")
    if c.task == "dpo" and c.data.packing:
        refuse("data.packing", "preference pairs are not packed", "remove it, or set task: sft")
    if c.task == "dpo" and c.data.loss != "auto":
        refuse("data.loss", "has no effect when task is `dpo`: only the answers are compared", "remove it")
    if c.task == "dpo" and c.data.format not in ("auto", "preference"):
        refuse(
            "data.format",
            f"task `dpo` learns from preference pairs, not `{c.data.format}`",
            "use `preference` or task: sft",
        )
    if c.task == "sft" and c.data.format == "preference":
        refuse(
            "data.format",
            "task `sft` does not learn from preference pairs",
            "set task: dpo, or map the answer with data.columns",
        )
    if len(c.training.report_to) > 1 and "none" in c.training.report_to:
        refuse("training.report_to", "`none` beside a tracker", "remove one of the two")
    return found


def _steps(c: Config) -> Found:
    """Step counts that do not fit together."""
    t = c.training
    found: Found = []
    if t.warmup >= 1 and t.warmup != int(t.warmup):
        what = f"from 1 on it is a number of steps, and {t.warmup:g} is not whole"
        found.append(("training.warmup", Diagnostic("", what, "0.03 is three percent of the steps")))
    if t.max_steps is not None and t.warmup > t.max_steps:
        what = f"{t.warmup:g} warmup steps, but the run ends after {t.max_steps}"
        found.append(("training.warmup", Diagnostic("", what, "a value below 1 is a share of the steps")))
    best = "keep_best" if t.keep_best else "early_stopping_patience" if t.early_stopping_patience is not None else ""
    if best and t.eval_steps != t.save_steps:
        unaligned = t.eval_steps is None or t.save_steps is None or t.save_steps % t.eval_steps
        if unaligned:
            what = "the best model can only be kept when every checkpoint falls on an evaluation"
            fix = "make save_steps a multiple of eval_steps, or leave both empty"
            found.append((f"training.{best}", Diagnostic("", what, fix)))
    return found


def _drop(c: Config) -> Found:
    """A method whose layers cannot share."""
    if c.method.drop is None:
        return []
    from lorary.methods.lora_drop import shareable

    try:
        method = c.method.build()
    except MethodError:  # told where its words were written
        return []
    return [("method.drop", Diagnostic("", problem.what, problem.fix)) for problem in shareable(method)]


def _after(c: Config) -> Found:
    """Earlier tasks for a method that has no place for them."""
    if not c.method.after:
        return []
    from lorary.spec.interfaces import Sequential

    try:
        delta = c.method.build().delta
    except MethodError:  # told where its words were written
        return []
    if isinstance(delta, Sequential):
        return []
    name = ", ".join(c.method.name)
    return [("method.after", Diagnostic("", f"`{name}` has no place for earlier tasks", "set method.name: o-lora"))]


def _length(c: Config) -> Found:
    """Rows that are longer than what the method lets the model read."""
    try:
        context = c.method.build().context
    except MethodError:  # told where its words were written
        return []
    length = context.length if context is not None else None
    if length is None or c.data.max_length <= length:
        return []
    what = f"rows of up to {c.data.max_length:,} tokens, and the method lets the model read {length:,}"
    return [("data.max_length", Diagnostic("", what, f"set method.options: {{length: {c.data.max_length}}}"))]


def _paths(c: Config) -> Found:
    """An output folder that holds, or is, something that must not be overwritten."""
    if "\0" in c.output:
        return [("output", Diagnostic("", "contains a NUL character"))]
    output = Path(c.output).expanduser().absolute()
    if output in (Path("/"), Path.home(), Path.cwd()):
        what = f"`{c.output}` is the root, home or working folder"
        return [("output", Diagnostic("", what, "name a folder of its own, such as runs/first"))]
    inputs = {
        "the base model": (c.model.id,),
        "the training data": c.data.train,
        "the validation data": c.data.validation,
        "the adapter of an earlier task": c.method.after,
    }
    for what, sources in inputs.items():
        for source in sources or ():
            path = Path(source.partition("#")[0]).absolute()
            if os.path.exists(path) and (path == output or output in path.parents):
                return [("output", Diagnostic("", f"`{c.output}` holds {what} (`{source}`)", "name another folder"))]
    return []
