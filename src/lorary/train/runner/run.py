"""Training from a configuration into a run folder."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback

from lorary.errors import LoraryError
from lorary.model.rank_pruning import directions_of
from lorary.train.config.config import Config
from lorary.train.data.lint import text
from lorary.train.runner.build import build_model, build_trainer
from lorary.train.runner.calibration_rows import with_sites
from lorary.train.runner.extend import check_longer
from lorary.train.runner.folder import ADAPTER, CARD, CHECKPOINTS, CONFIG, ENVIRONMENT, EVENTS, PLOTS, SAMPLE, RunFolder
from lorary.train.runner.lora_drop import choose_layers
from lorary.train.runner.model_card import CardData, model_card
from lorary.train.runner.prepare import RunPlan, prepare
from lorary.train.runner.recorder import EvaluateAtEnd, Recorder
from lorary.train.runner.result import Run, step_memory
from lorary.train.trainer import checkpoint, process_memory
from lorary.train.trainer.distributed import on_main_process, this_process
from lorary.train.trainer.environment import changes, environment
from lorary.train.trainer.events import why_over
from lorary.train.trainer.progress import ProgressLines
from lorary.train.trainer.resume import read_adapter
from lorary.train.trainer.step_memory import count_memory
from lorary.train.trainer.trainer_internals import tokens_seen

_log = logging.getLogger("lorary.train")


def run(
    config: Config,
    *,
    resume: bool = False,
    extend: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train an adapter from a configuration, into its `output` folder.

    Under `torchrun` or `accelerate launch` every process calls this; the first one writes.

    Args:
        config: of the run; `lorary.train.config.load.load` reads one.
        resume: continue from the newest complete checkpoint in the folder, if any. A finished run is left as it is.
        extend: continue there to a later end: the configuration has a larger `training.epochs` or `max_steps`.
        overwrite: first remove the run in the folder.
        quiet: no progress.
        callbacks: Transformers' callbacks, in addition to lorary's own.

    Raises:
        ConfigError: the configuration contradicts itself, or the folder is not free.
        DataError: the data cannot be read, or has no labelled tokens.
        TrainingError: non-finite numbers, or out of memory; the last good checkpoint is kept.
        LoraryError: any other failure, with its reason.
    """
    transformers.logging.set_verbosity_error()
    prepared = prepare(config, processes=this_process().num_processes)
    options: dict[str, Any] = {"resume": resume, "extend": extend, "overwrite": overwrite, "quiet": quiet}
    return run_prepared(prepared, callbacks=callbacks, **options)


def run_prepared(
    prepared: RunPlan,
    *,
    resume: bool = False,
    extend: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    report: bool = True,
) -> Run:
    """`run` of a configuration whose rows and plan are there already.

    Args:
        prepared: the run before its first step.
        resume: as in `run`; likewise `extend`, `overwrite`, `quiet` and `callbacks`.
        report: whether what only its page shows is made, which takes seconds: samples, pictures, predicted memory.
    """
    folder = RunFolder(prepared.config.output)
    if resume and not extend and not overwrite:
        finished = on_main_process(lambda: _finished(folder, prepared.config))
        if finished is not None:
            return finished
    resume = resume or extend
    if extend and not overwrite:
        on_main_process(lambda: check_longer(prepared.config, prepared.steps))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # TRL uses a name that Transformers deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        options = {"resume": resume, "overwrite": overwrite, "extend": extend}
        on_main_process(lambda: stack.enter_context(folder.opened(prepared.config, **options)))
        if this_process().is_main_process:
            folder.mark()
            stack.enter_context(_log_to_file(folder / EVENTS))
        try:
            shown: dict[str, Any] = {"quiet": quiet, "callbacks": callbacks, "report": report}
            return _run(prepared, folder, resume=resume, extend=extend, **shown)
        except LoraryError as error:
            _log.debug("stopped: %s", error)
            raise


def _finished(folder: RunFolder, config: Config) -> Run | None:
    """The finished run in the folder, untouched; None if there is none.

    Raises:
        ConfigError: the folder belongs to another run.
    """
    folder.check(config, resume=True, overwrite=False)
    record = folder.finished()
    if record is None or record.steps is None:
        return None
    done = Run(folder.path, record.steps, tuple(folder.history()), 0, 0.0, None, 0)
    _log.info("this run is finished (%s): nothing to resume, its adapter is in %s", record.end, done.adapter)
    return done


def _run(
    prepared: RunPlan,
    folder: RunFolder,
    *,
    resume: bool,
    extend: bool,
    quiet: bool,
    callbacks: Sequence[TrainerCallback],
    report: bool,
) -> Run:
    first = this_process().is_main_process
    resumed, skipped = on_main_process(lambda: _checkpoint(folder)) if resume else (None, ())
    if first and resumed is None:
        _write_start(prepared, folder, None, skipped)
    if prepared.config.method.drop is not None:
        prepared, signal = choose_layers(prepared, folder, resumed=resumed is not None, quiet=quiet)
        if signal:
            _log.info("interrupted in the probe; --resume repeats it")
            return Run(folder.path, 0, (), signal, 0.0, None, 0)
    process_memory.reset_peak()
    before = process_memory.current_bytes()
    model = build_model(prepared, resumed)
    prepared = with_sites(prepared, model)
    bar, recorder = ProgressLines(), Recorder(folder)
    if resumed is not None:  # once the checkpoint is known to be of this run
        recorder.start = lambda: _write_start(prepared, folder, resumed, skipped)
    callbacks = [recorder, EvaluateAtEnd(), *([] if quiet else [bar]), *callbacks]
    trainer = build_trainer(prepared, model, folder / CHECKPOINTS, resumed=resumed is not None, callbacks=callbacks)
    recorder.rule_report, trainer.extended = trainer.rule_report, extend
    start = time.monotonic()
    counter = count_memory(trainer, prepared.config.task)
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        bar.close()
        trainer.head.remove()
        counter.close()
    seconds, measured = time.monotonic() - start, process_memory.peak_bytes() - before
    result = _result(prepared, folder, trainer, seconds, measured)
    if not result.interrupted:
        trainer.save_model(str(result.adapter))
    if first:
        result = replace(result, step_memory=step_memory(prepared, counter, report))
        _write_results(prepared, folder, result, trainer, report)
    return result


def _result(prepared: RunPlan, folder: RunFolder, trainer: Any, seconds: float, measured: int) -> Run:
    """The result of training, without the memory of a step."""
    return Run(
        folder.path,
        steps=trainer.state.global_step,
        history=tuple(folder.history()) if this_process().is_main_process else (),
        interrupted=0 if why_over(trainer) else trainer.guard.stop,  # a signal in the last step stops nothing
        seconds=seconds,
        predicted=prepared.memory.total if prepared.memory.activations is not None else None,
        measured=measured,
        planned_steps=trainer.state.max_steps,
        best_step=(trainer.state.best_global_step or None) if prepared.config.training.keeps_best else None,
    )


def _checkpoint(folder: RunFolder) -> tuple[Path | None, tuple[str, ...]]:
    """The newest complete checkpoint, None if there is none; and what to say of those that are not."""
    path, skipped = checkpoint.newest(folder / CHECKPOINTS)
    if path is None:
        skipped += ("no complete checkpoint to resume from: training starts from the beginning",)
    return path, skipped


def _write_start(prepared: RunPlan, folder: RunFolder, resumed: Path | None, messages: Sequence[str]) -> None:
    folder.write(CONFIG, prepared.config.to_yaml())
    _write_environment(folder, checkpoint.step_of(resumed) if resumed else None)
    folder.write(SAMPLE, text(prepared.lint) + "\n")
    for sentence in messages:
        _log.warning("%s", sentence)
    folder.truncate_history(checkpoint.step_of(resumed) if resumed else -1)
    for note in prepared.notes:
        _log.info("%s", note)


def _write_results(prepared: RunPlan, folder: RunFolder, result: Run, trainer: Any, report: bool) -> None:
    """The pictures; if the run was not interrupted, the model card and the report; last, that the run is over."""
    if report:
        _write_pictures(folder, result)
    if result.interrupted:
        _log.info("interrupted at step %d; resume with --resume", result.steps)
        return
    lint = prepared.lint
    rows = lint.rows, lint.held_out
    data = CardData(prepared.config, prepared.plan, rows, lint.labelled, tokens_seen(trainer), result, lint.sources)
    card = model_card(folder.path.absolute().name, data)
    folder.write(CARD, card)
    folder.write(f"{ADAPTER}/{CARD}", card)
    _log.info("%s", result.ending)
    if report:
        from lorary.train.runner.report import write_report  # matplotlib takes a second to import

        write_report(prepared, folder, result, trainer)
    if end := why_over(trainer):
        folder.note_written(ADAPTER, steps=result.steps, end=end)


def _write_pictures(folder: RunFolder, result: Run) -> None:
    """The curve of the loss; of a finished run also its ranks, if a rule has changed them."""
    from lorary.analysis.heatmap import ranks_svg  # matplotlib takes a second to import
    from lorary.analysis.loss_plot import loss_svg

    folder.write(f"{PLOTS}/loss.svg", loss_svg(result.history))
    if not result.interrupted and any("ranks" in record for record in result.history):
        sites = read_adapter(folder.path).sites
        ranks = {site.site.name: directions_of(site) for site in sites}
        folder.write(f"{PLOTS}/ranks.svg", ranks_svg(ranks, max(site.r for site in sites)))


def _write_environment(folder: RunFolder, step: int | None) -> None:
    """Write `env.json`: the environment in which the run began, and every change with the step that it came after."""
    now, first = environment(), folder.read_json(ENVIRONMENT) if step is not None else {}
    sessions = [first, *first.get("resumed", [])]
    if first and not changes(sessions[-1], now):
        return
    record = first | {"resumed": [*sessions[1:], {"step": step, **now}]} if first else now
    folder.write(ENVIRONMENT, json.dumps(record, indent=2) + "\n")


@contextmanager
def _log_to_file(path: Path) -> Iterator[None]:
    """A context in which lorary's messages are also written to a file, with the time."""
    handler = _EventLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    level = _log.level
    _log.setLevel(min(level, logging.DEBUG) if level else logging.DEBUG)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        with suppress(OSError):
            handler.close()


class _EventLog(logging.FileHandler):
    """A log file that a full disk may cut short: the run's own error reports the full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
