"""run: from a configuration to a run folder."""

from __future__ import annotations

import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

import lorary
from lorary.errors import LoraryError
from lorary.train import checkpoint, usage
from lorary.train.arguments import arguments
from lorary.train.card import Facts, card, versions
from lorary.train.config import Config
from lorary.train.distributed import processes
from lorary.train.dpo import DPOTrainer
from lorary.train.folder import (
    ADAPTER,
    CARD,
    CHECKPOINTS,
    CONFIG,
    ENVIRONMENT,
    EVENTS,
    PLOTS,
    SAMPLE,
    RunFolder,
)
from lorary.train.lint import text
from lorary.train.models import load_model
from lorary.train.packing import check_packing
from lorary.train.preparation import Prepared, prepare
from lorary.train.progress import ProgressLines
from lorary.train.recording import LastEvaluation, Recorder
from lorary.train.sft import SFTTrainer

_log = logging.getLogger("lorary.train")
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Args:
        folder: where everything about it is.
        steps: optimizer steps done, resumed ones included.
        history: the records of `metrics.jsonl`.
        interrupted: the number of the signal that ended it early; 0 if it came to its end.
        seconds: of this session's training.
        predicted: bytes of memory that were expected; None where they could not be computed.
        measured: bytes that it took.
    """

    folder: Path
    steps: int
    history: tuple[dict[str, Any], ...]
    interrupted: int
    seconds: float
    predicted: int | None
    measured: int

    @property
    def adapter(self) -> Path:
        """The adapter's folder; a run that was interrupted has none yet."""
        return self.folder / ADAPTER


def run(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Trains an adapter as a configuration says, into its `output` folder.

    Under `torchrun` or `accelerate launch` every process calls this; the first one writes.

    Args:
        config: of the run; `lorary.train.config_file.load` reads one.
        resume: go on with the newest complete checkpoint in the folder, if there is one.
        overwrite: remove the run that is in the folder first.
        quiet: no progress.
        callbacks: Transformers' callbacks, beside lorary's own.

    Raises:
        ConfigError: the configuration contradicts itself, or the folder is not free.
        DataError: the data cannot be read, or would teach nothing.
        TrainingError: training met numbers that are not finite; the last checkpoint is from before.
        LoraryError: whatever else could not be done, each with its reason.
    """
    transformers.logging.set_verbosity_error()
    prepared = prepare(config)
    folder = RunFolder(prepared.config.output)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # TRL asks Transformers by a name that is going.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        _first(lambda: stack.enter_context(folder.opened(prepared.config, resume=resume, overwrite=overwrite)))
        if processes().is_main_process:
            stack.enter_context(_events(folder / EVENTS))
        try:
            return _run(prepared, folder, resume=resume, quiet=quiet, callbacks=callbacks)
        except LoraryError as error:
            _log.debug("stopped: %s", error)
            raise


def _run(
    prepared: Prepared, folder: RunFolder, *, resume: bool, quiet: bool, callbacks: Sequence[TrainerCallback]
) -> Run:
    first = processes().is_main_process
    found: tuple[Path | None, tuple[str, ...]] = (None, ())
    if resume:
        found = _first(lambda: checkpoint.newest(folder / CHECKPOINTS))
    resumed, skipped = found
    if first:
        _begin(prepared, folder, resumed, skipped, resume)
    usage.restart()
    before = usage.now()
    model = _model(prepared)
    bar = ProgressLines()
    shown = [Recorder(folder), LastEvaluation(), *([] if quiet else [bar]), *callbacks]
    trainer = trainer_of(prepared, model, folder / CHECKPOINTS, resumed=resumed is not None, callbacks=shown)
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        bar.close()
        trainer.head.remove()
    seconds, measured = time.monotonic() - start, usage.peak() - before
    signal = trainer.guard.stop
    if not signal:
        trainer.save_model(str(folder / ADAPTER))
    predicted = prepared.memory.total if prepared.memory.activations is not None else None
    history = folder.history() if first else []
    done = Run(folder.path, trainer.state.global_step, tuple(history), signal, seconds, predicted, measured)
    if first:
        _end(prepared, folder, done, trainer._total_train_tokens)
    return done


def _begin(prepared: Prepared, folder: RunFolder, resumed: Path | None, skipped: tuple[str, ...], resume: bool) -> None:
    folder.write(CONFIG, prepared.config.to_yaml())
    folder.write(ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    folder.write(SAMPLE, text(prepared.lint) + "\n")
    for sentence in skipped:
        _log.warning("%s", sentence)
    if resume and resumed is None:
        _log.warning("there is no complete checkpoint to resume from: training begins anew")
    folder.go_back_to(checkpoint.step_of(resumed) if resumed else -1)
    for note in prepared.notes:
        _log.info("%s", note)


def _end(prepared: Prepared, folder: RunFolder, done: Run, tokens: int) -> None:
    """The picture and, of a run that came to its end, the card."""
    from lorary.inspect.plots import loss_svg  # matplotlib takes a second to import

    folder.write(f"{PLOTS}/loss.svg", loss_svg(done.history))
    if done.interrupted:
        _log.info("interrupted at step %d; resume with --resume", done.steps)
        return
    rows = (prepared.lint.rows, prepared.lint.held_out)
    facts = Facts(
        prepared.config,
        prepared.plan,
        rows,
        prepared.lint.labelled,
        done.steps,
        tokens,
        done.seconds,
        done.history,
        done.predicted,
        done.measured,
        versions(),
    )
    written = card(folder.path.absolute().name, facts, folder / ADAPTER)
    folder.write(CARD, written)
    folder.write(f"{ADAPTER}/{CARD}", written)
    _log.info("done: %d steps in %.0f s, adapter in %s", done.steps, done.seconds, done.adapter)


def _model(prepared: Prepared) -> Any:
    """The base with its method attached."""
    return lorary.attach(load_model(prepared.config.model), prepared.plan, seed=prepared.config.training.seed)


def trainer_of(prepared: Prepared, model: Any, output: Path, *, resumed: bool, callbacks: list[TrainerCallback]) -> Any:
    """The trainer of a run.

    Args:
        prepared: the run.
        model: with its method attached.
        output: the folder of the checkpoints.
        resumed: whether the run goes on.
        callbacks: Transformers' callbacks.
    """
    held_out = bool(prepared.held_out and prepared.held_out.rows)
    args = arguments(prepared.config, output, held_out=held_out, resumed=resumed)
    patience = prepared.config.training.early_stopping_patience
    if patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=patience)]
    kind = DPOTrainer if prepared.config.task == "dpo" else SFTTrainer
    with _no_bars():
        trainer = kind(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(list(prepared.train.rows)),
            eval_dataset=Dataset.from_list(list(prepared.held_out.rows)) if prepared.held_out and held_out else None,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    if prepared.config.data.packing:
        check_packing(model, trainer.data_collator)
    return trainer


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a result."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "processes": processes().num_processes,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _first(work: Callable[[], T]) -> T:
    """Does some work in the first process alone and gives its result, or its error, to all."""
    outcome: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            outcome = [work(), None]
        except LoraryError as error:
            outcome = [None, error]
    if processes().num_processes > 1:
        broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    found: T = result
    return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without datasets' own progress bars, for what takes a moment."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


@contextmanager
def _events(path: Path) -> Iterator[None]:
    """What lorary says goes to `events.log` too, with the time."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    level = _log.level
    _log.setLevel(min(level, logging.DEBUG) if level else logging.DEBUG)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        handler.close()
