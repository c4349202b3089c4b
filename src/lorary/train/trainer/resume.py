"""Exact resume: the adapter and the training state, written to a checkpoint and restored bit for bit."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from transformers.trainer_callback import ExportableState

import lorary
from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.adapters.attached import load_into as load_into
from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.files.findings import AdapterWarning
from lorary.layers.dtensor import full_cpu_copy
from lorary.model.fingerprint import Fingerprint
from lorary.model.plan import Plan
from lorary.model.rank_pruning import directions_of
from lorary.spec.calibration import CalibratedInit
from lorary.spec.placement import start_name
from lorary.train.trainer import checkpoint, optimizer_state, rng, same_run
from lorary.train.trainer.distributed import on_main_process
from lorary.train.trainer.environment import environment
from lorary.train.trainer.trainer_internals import log_state, restore_log_state

_log = logging.getLogger("lorary.train")


# --- the adapter ----------------------------------------------------------------------------------------------------


def copy_adapter(model: nn.Module, fingerprint: Fingerprint) -> Adapter:
    """A copy of the adapter in a model. Under FSDP every rank must call this: it gathers.

    Args:
        model: with a method attached, its parameters whole or sharded.
        fingerprint: of the base, taken before it was sharded.
    """
    return dataclasses.replace(Adapter.of(model), base=fingerprint)


def read_adapter(path: Path) -> Adapter:
    """The adapter of a checkpoint; it may be zero, as after the first step of a warmup."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        return load_adapter(path / checkpoint.ADAPTER)


def plan_with_saved_start(plan: Plan, path: Path) -> Plan:
    """The plan with the initial factors of a checkpoint, for inits that subtract them from the base (PiSSA, OLoRA).

    Computed again, with other threads or on another machine, they would differ in their last bits; and from a base
    that is quantised or sharded by then, other factors could not be subtracted. An init that reads data has chosen its
    layers' ranks, too; its tensors are loaded, so that the data is not read again.
    """
    calibrated = any(isinstance(site.init, CalibratedInit) for site in plan.sites)
    if not (calibrated or any(site.starts for site in plan.sites)):
        return plan
    saved = read_adapter(path)
    if calibrated:
        plan = dataclasses.replace(plan, sites=saved.sites)
    tensors, fixed = saved.tensors, dict(plan.fixed_tensors)
    for site in plan.sites:
        name, roles = site.site.name, {start_name(role) for role in site.starts}
        if isinstance(site.init, CalibratedInit):
            roles |= site.shapes.keys()
        start = {role: t for role, t in tensors.get(name, {}).items() if role in roles}
        fixed[name] = {**plan.fixed_tensors.get(name, {}), **start}
    return dataclasses.replace(plan, fixed_tensors=fixed)


def warn_of_pruning_since(best: Adapter, step: int, ranks: Mapping[str, int]) -> None:
    """Log that the best checkpoint has more rank directions than the end of the run (AdaLoRA's budget).

    Args:
        best: its adapter.
        step: when it was written.
        ranks: site -> rank directions at the end of the run; empty if no rule prunes.
    """
    here = sum(ranks.values())
    there = sum(directions_of(site) for site in best.compact().sites if site.site.name in ranks)
    if ranks and there > here:
        text = "the best checkpoint is that of step %d, when there were %d directions; the run has ended with %d"
        _log.warning(text, step, there, here)


# --- the checkpoint -------------------------------------------------------------------------------------------------


def save_checkpoint(trainer: Any, path: Path) -> None:
    """Write a checkpoint and remove old ones. Every rank must call this: each has a part of the state.

    Raises:
        LoraryError: on every rank, if one could not write.
    """
    model = trainer.unwrapped_model()
    state, adapter = _training_state(trainer, model), copy_adapter(model, trainer.fingerprint)
    facts = {"step": trainer.state.global_step, "lorary": lorary.__version__}
    failure: LoraryError | None = None
    if trainer.args.should_save:
        try:
            checkpoint.write(path, adapter, state, facts, lambda folder: _write_trainer_state(trainer, folder), model)
            remove_old_checkpoints(trainer)
        except LoraryError as error:
            failure = error
    for reported in filter(None, gather_object([failure])):
        raise reported


def remove_old_checkpoints(trainer: Any) -> None:
    """Keep as many checkpoints as the trainer's limit says, the best one among them."""
    folder, best = Path(trainer.args.output_dir), trainer.state.best_model_checkpoint
    checkpoint.rotate(folder, trainer.save_total_limit, best, trainer.state.global_step)


def choose_checkpoint(trainer: Any, wanted: str | bool) -> Path:
    """The checkpoint to resume from, the same on every rank; newer ones that are passed over are logged.

    Args:
        trainer: the trainer.
        wanted: a checkpoint folder, or True for the newest complete one in the trainer's output folder.

    Raises:
        FileError: there is none, or it is incomplete.
    """

    def find() -> tuple[Path | None, tuple[str, ...]]:
        if isinstance(wanted, bool):
            return checkpoint.newest(Path(trainer.args.output_dir))
        return (Path(wanted) if Path(wanted).is_dir() else None), ()

    path, skipped = on_main_process(find)
    for sentence in skipped:
        _log.warning("%s", sentence)
    if path is None:
        where = trainer.args.output_dir if isinstance(wanted, bool) else wanted
        problem = Diagnostic(str(where), "holds no complete checkpoint", "start without resuming")
        raise FileError("cannot resume this run:", [problem])
    _log.info("resuming from %s", path.name)
    return path


def restore_optimizer(trainer: Any, state: dict[str, Any]) -> None:
    """Restore the optimizer, the schedule and the scaler.

    Raises:
        TrainingError: the optimizer is another one.
    """
    optimizer_state.restore(unwrapped_optimizer(trainer), trainer.unwrapped_model(), state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    optimizer_state.follow_schedule(unwrapped_optimizer(trainer), trainer.lr_scheduler)
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])


def restore_best(trainer: Any, resumed: Path) -> None:
    """Find the best checkpoint by its step: in the output folder, or beside the resumed one. Folders may have moved."""
    step = trainer.state.best_global_step
    places = [folder / f"checkpoint-{step}" for folder in (Path(trainer.args.output_dir), resumed.parent)]
    found = [path for path in places if step and path.is_dir()]
    trainer.state.best_model_checkpoint = str(found[0]) if found else None


def restore_log(trainer: Any, log: dict[str, Any]) -> None:
    """Restore the sums since the last line of the log, so that its next line is the same."""
    restore_log_state(trainer, log)


def unwrapped_optimizer(trainer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


# --- the training state ---------------------------------------------------------------------------------------------


def _training_state(trainer: Any, model: nn.Module) -> dict[str, Any]:
    scaler = trainer.accelerator.scaler
    return {
        "optimizer": optimizer_state.capture(unwrapped_optimizer(trainer), model),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "rng": gather_object([rng.capture()]),
        "rules": {k: full_cpu_copy(t) for k, t in trainer.rules.state_dict().items()},
        "data": same_run.data_order(trainer),
        "environment": environment(),
        "log": log_state(trainer),
    }


def _write_trainer_state(trainer: Any, folder: Path) -> None:
    """Transformers' own record of the run, with the counters of its callbacks (early stopping)."""
    exported: dict[str, list[Any]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            exported.setdefault(type(callback).__name__, []).append(callback.state())
    # Transformers reads a single state as it is and several of a class as a list
    trainer.state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in exported.items()}
    # the best checkpoint is known by its step: a path would be wrong in a folder that is moved
    state = dataclasses.replace(trainer.state, best_model_checkpoint=None)
    state.save_to_json(str(folder / checkpoint.TRAINER_STATE))
