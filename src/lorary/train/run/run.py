"""run: from a configuration to a run folder."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from lorary.errors import LoraryError
from lorary.model.rank_pruning import directions_of
from lorary.train.config.config import Config
from lorary.train.data.lint import text
from lorary.train.run.build import model_of, trainer_of
from lorary.train.run.folder import ADAPTER, CARD, CHECKPOINTS, CONFIG, ENVIRONMENT, EVENTS, PLOTS, SAMPLE, RunFolder
from lorary.train.run.lora_drop import drop_run
from lorary.train.run.model_card import Facts, card, versions
from lorary.train.run.prepare import RunPlan, prepare
from lorary.train.run.recorder import LastEvaluation, Recorder
from lorary.train.trainer import checkpoint, process_memory
from lorary.train.trainer.distributed import on_main_process, processes
from lorary.train.trainer.progress import ProgressLines
from lorary.train.trainer.resume import adapter_of

_log = logging.getLogger("lorary.train")


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
        config: of the run; `lorary.train.config.load.load` reads one.
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
        on_main_process(lambda: stack.enter_context(folder.opened(prepared.config, resume=resume, overwrite=overwrite)))
        if processes().is_main_process:
            stack.enter_context(_events(folder / EVENTS))
        try:
            return _run(prepared, folder, resume=resume, quiet=quiet, callbacks=callbacks)
        except LoraryError as error:
            _log.debug("stopped: %s", error)
            raise


def _run(
    prepared: RunPlan, folder: RunFolder, *, resume: bool, quiet: bool, callbacks: Sequence[TrainerCallback]
) -> Run:
    first = processes().is_main_process
    found: tuple[Path | None, tuple[str, ...]] = (None, ())
    if resume:
        found = on_main_process(lambda: checkpoint.newest(folder / CHECKPOINTS))
    resumed, skipped = found
    if first:
        _begin(prepared, folder, resumed, skipped, resume)
    if prepared.config.method.drop is not None:
        prepared, signal = drop_run(prepared, folder, resumed=resumed is not None, quiet=quiet)
        if signal:
            _log.info("interrupted in the probe, which begins anew with --resume")
            return Run(folder.path, 0, (), signal, 0.0, None, 0)
    process_memory.reset_peak()
    before = process_memory.current_bytes()
    model = model_of(prepared, resumed)
    bar = ProgressLines()
    recorder = Recorder(folder)
    shown = [recorder, LastEvaluation(), *([] if quiet else [bar]), *callbacks]
    trainer = trainer_of(prepared, model, folder / CHECKPOINTS, resumed=resumed is not None, callbacks=shown)
    trainer.predicted, recorder.figures = prepared.memory, trainer.figures
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        bar.close()
        trainer.head.remove()
    seconds, measured = time.monotonic() - start, process_memory.peak_bytes() - before
    signal = trainer.guard.stop
    if not signal:
        trainer.save_model(str(folder / ADAPTER))
    predicted = prepared.memory.total if prepared.memory.activations is not None else None
    history = folder.history() if first else []
    done = Run(folder.path, trainer.state.global_step, tuple(history), signal, seconds, predicted, measured)
    if first:
        _end(prepared, folder, done, trainer._total_train_tokens)
    return done


def _begin(prepared: RunPlan, folder: RunFolder, resumed: Path | None, skipped: tuple[str, ...], resume: bool) -> None:
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


def _end(prepared: RunPlan, folder: RunFolder, done: Run, tokens: int) -> None:
    """The picture and, of a run that came to its end, the card."""
    from lorary.analysis.loss_plot import loss_svg  # matplotlib takes a second to import

    folder.write(f"{PLOTS}/loss.svg", loss_svg(done.history))
    if any("ranks" in record for record in done.history) and not done.interrupted:
        _draw_ranks(folder)
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


def _draw_ranks(folder: RunFolder) -> None:
    """The ranks that are left, of the adapter as it has been saved."""
    from lorary.analysis.heatmap import ranks_svg

    placed = adapter_of(folder.path).sites
    ranks = {p.site.name: directions_of(p) for p in placed}
    folder.write(f"{PLOTS}/ranks.svg", ranks_svg(ranks, max(p.r for p in placed)))


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


@contextmanager
def _events(path: Path) -> Iterator[None]:
    """What lorary says goes to `events.log` too, with the time."""
    handler = _Events(path, encoding="utf-8")
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


class _Events(logging.FileHandler):
    """A file that a full disk may cut short: the run's own error, which nobody must miss, says that it is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)
