"""`lorary inspect intrinsic`: train in random subspaces of several dimensions, and report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from lorary.analysis.inspection.intrinsic import HEAD, IntrinsicDimension, intrinsic_dimension
from lorary.analysis.inspection.intrinsic_page import intrinsic_page
from lorary.cli._inspect.report import FILES, json_text, report_folder, write_report
from lorary.cli._inspect.runs import configuration, quiet_training, refuse_tasks, train, trainer_of
from lorary.cli._out_folder import folder_problems
from lorary.cli._progress import progress_bar
from lorary.cli._table import print_table
from lorary.errors import ConfigError, Diagnostic
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.train.config.config import Config, MethodSection
from lorary.train.config.sources import paths
from lorary.train.runner.build import build_model
from lorary.train.runner.prepare import RunPlan, prepare

_MOST_HELD_OUT = 128  # rows, evenly spread
_DIGITS = 12
_TASKS = {"grpo": "its loss does not measure the answers"}


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    Args:
        source: a configuration, a run folder, or a model.
        data: the data for a model.
        sets: `key=value` over the configuration.
        dims: comma-separated dimensions.
        steps: optimizer steps of each training.
        lr: comma-separated learning rates in a subspace.
        full_lr: that of full fine-tuning.
        said: structure-aware.
        seed: of the projections.
    """

    source: str
    data: str
    sets: tuple[str, ...]
    dims: str
    steps: int
    lr: str
    full_lr: float
    said: bool
    seed: int


def run(request: Request, out: Path | None, *, as_json: bool) -> None:
    """Measure and report.

    Raises:
        ConfigError: every invalid option.
        LoraryError: the configuration, the model or the data cannot be used; or training fails.
    """
    dims, problems = _numbers("--dims", request.dims, "a whole number", lambda text: int(text[:_DIGITS]))
    rates, more = _numbers("--lr", request.lr, "a number", float)
    problems += [*more, *folder_problems(out, FILES)]
    if not 0 < request.full_lr < math.inf:
        problems.append(Diagnostic(f"--full-lr {request.full_lr:g}", "is not a finite number above 0"))
    if problems:
        raise ConfigError("cannot measure the intrinsic dimension:", problems)
    config = _config(request)
    with quiet_training() as scratch, report_folder(out) as target:
        with quiet_progress_bars():
            prepared = _prepared(config)
            found = _measure(request, prepared, [int(d) for d in dims], rates, scratch)
        if target is not None:
            write_report(target, _record(request, config, found), intrinsic_page(found, *_words(config)))
    _show(request, config, found, as_json=as_json)


def _numbers(option: str, text: str, what: str, read: Callable[[str], float]) -> tuple[list[float], list[Diagnostic]]:
    """The numbers of a comma-separated option, and the problems of the others."""
    found, problems = [], []
    for part in [part.strip() for part in text.split(",") if part.strip()] or [text]:
        try:
            value = read(part)
        except ValueError:
            value = 0
        if 0 < value < math.inf:
            found.append(value)
        else:
            problems.append(Diagnostic(f"{option} {part}", f"is not {what} above 0", "separate several by commas"))
    return found, problems


def _config(request: Request) -> Config:
    """The configuration with full fine-tuning as its method."""
    fixed: dict[str, Any] = {
        "max_steps": request.steps,
        "epochs": None,
        "early_stopping_patience": None,
        "keep_best": False,
    }
    fixed |= {"report_to": ("none",), "eval_steps": None, "save_steps": None, "lr": request.full_lr}
    config = configuration(request.source, request.data, request.sets, fixed)
    refuse_tasks(config, request.source, _TASKS)
    if config.model.adapter:
        what = "the subspace begins at the base, and this run goes on from an adapter"
        problem = Diagnostic("model.adapter", what, "leave it out")
        raise ConfigError("cannot measure the intrinsic dimension:", [problem])
    model = config.model.model_copy(update={"dtype": "float32"})
    return config.model_copy(update={"method": MethodSection(name=("full",)), "model": model})


def _prepared(config: Config) -> RunPlan:
    """The run with few held-out rows.

    Raises:
        ConfigError: there are none.
    """
    prepared = prepare(config)
    held_out = prepared.held_out
    if held_out is None or not held_out.rows:
        what, fix = "no rows are held out, and the training loss does not measure it", "set data.validation_split=0.1"
        raise ConfigError("cannot measure the intrinsic dimension:", [Diagnostic("data.validation", what, fix)])
    stride = math.ceil(len(held_out.rows) / _MOST_HELD_OUT)
    rows = dataclasses.replace(held_out, rows=held_out.rows[::stride], sources=())
    return dataclasses.replace(prepared, held_out=rows)


def _measure(
    request: Request, prepared: RunPlan, dims: Sequence[int], rates: Sequence[float], scratch: Path
) -> IntrinsicDimension:
    model = build_model(prepared)
    total = request.steps * (1 + len(set(dims)) * len(rates))
    with progress_bar(total) as update:
        work: list[str] = []

        class Step(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
            def on_step_end(self, *_: Any, **__: Any) -> None:
                update(advance=1, description=work[-1])

        def trained(optimizer: torch.optim.Optimizer | None) -> float:
            trainer = trainer_of(prepared, model, scratch, [Step()])
            trainer.args.eval_strategy = IntervalStrategy.NO
            try:
                if optimizer is not None:
                    trainer.optimizer = optimizer
                    train(trainer)
                return float(trainer.evaluate()["eval_loss"])
            finally:
                trainer.head.remove()

        return intrinsic_dimension(
            model,
            trained,
            dims,
            lr=rates,
            full_lr=request.full_lr,
            said=request.said,
            seed=request.seed,
            progress=work.append,
        )


def _words(config: Config) -> tuple[str, str]:
    """The model and the data as the user named them, for a title."""
    return config.model.id, ", ".join(paths(config.data.train))


def _record(request: Request, config: Config, found: IntrinsicDimension) -> dict[str, Any]:
    model, data = _words(config)
    t = config.training
    rows = {"batch": t.batch_size * t.gradient_accumulation_steps, "steps": request.steps}
    return {"model": model, "data": data, "task": config.task, **rows} | found.to_dict()


def _show(request: Request, config: Config, found: IntrinsicDimension, *, as_json: bool) -> None:
    if as_json:
        print(json_text(_record(request, config, found)))
        return
    model, data = _words(config)
    way = "SAID" if request.said else "DID"
    title = f"{model} on {data}, {request.steps} steps in subspaces of dimension d ({way})"
    print_table(title, HEAD, found.rows(), [found.verdict])
