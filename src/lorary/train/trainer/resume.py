"""Exact resume: the adapter and the training state, written to a checkpoint and restored bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers.trainer_callback import ExportableState

import lorary
from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, FileError, LoraryError, TrainingError
from lorary.files.findings import AdapterWarning
from lorary.layers.adapted import adapted_layers
from lorary.layers.dtensor import copy_into, full_cpu_copy
from lorary.model.fingerprint import Fingerprint
from lorary.model.plan import Plan
from lorary.model.rank_pruning import directions_of
from lorary.model.residual_base import load_start
from lorary.model.state import base_parameter, require_attached
from lorary.spec.placement import start_name
from lorary.train.trainer import checkpoint, optimizer_state, rng
from lorary.train.trainer.distributed import on_main_process
from lorary.train.trainer.trainer_internals import log_state, restore_log_state, train_batch_size

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
    that is quantised or sharded by then, other factors could not be subtracted.
    """
    if not any(site.starts for site in plan.sites):
        return plan
    tensors = read_adapter(path).tensors
    fixed = dict(plan.fixed_tensors)
    for site in plan.sites:
        name, roles = site.site.name, {start_name(role) for role in site.starts}
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
    here, there = sum(ranks.values()), sum(map(directions_of, best.compact().sites))
    if ranks and there > here:
        text = "the best checkpoint is that of step %d, when there were %d directions; the run has ended with %d"
        _log.warning(text, step, there, here)


def load_into(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into the parameters of a model, which an optimizer may hold.

    Raises:
        FileError: its sites, roles or shapes differ from the model's; every difference.
    """
    state, layers = require_attached(model, "load"), adapted_layers(model)
    here = {site.site.name: site.stored for site in state.sites}
    there = {name: {role: tuple(t.shape) for role, t in roles.items()} for name, roles in adapter.tensors.items()}
    problems = [
        Diagnostic(name, f"{there.get(name, 'nothing')} in the checkpoint, {here.get(name, 'nothing')} here")
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    only = sorted(set(adapter.full) ^ set(state.full))
    problems += [Diagnostic(name, f"trains only {'here' if name in state.full else 'there'}") for name in only]
    if problems:
        raise FileError("the checkpoint holds another adapter:", problems)
    for name, layer in layers.items():
        for role, parameter in layer.params.items():
            copy_into(parameter, adapter.tensors[name][role])
        load_start(model, layer, adapter.tensors[name])
    for name, tensor in adapter.full.items():
        copy_into(base_parameter(model, name), tensor)


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
            checkpoint.rotate(path.parent, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
        except LoraryError as error:
            failure = error
    for reported in filter(None, gather_object([failure])):
        raise reported


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
    """Restore the optimizer, the schedule and the scaler, after a check that the data is that of the checkpoint.

    Raises:
        TrainingError: the rows, the batches or the optimizer differ.
    """
    there, here = state["data"], _data_order(trainer)
    differ = [k for k in here if there[k] != here[k]]
    problems = [Diagnostic(k, f"{there[k]} in the checkpoint, {here[k]} here") for k in differ if k != "contents"]
    if "contents" in differ:
        fix = "restore the run's original data, or start again"
        problems.append(Diagnostic("contents", "the training rows are not those of the checkpoint", fix))
    if problems:
        raise TrainingError("this checkpoint belongs to another run:", problems)
    optimizer_state.restore(unwrapped_optimizer(trainer), trainer.unwrapped_model(), state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])


def has_same_rows(trainer: Any, state: dict[str, Any]) -> bool:
    """Whether the training rows are those of the checkpoint, so that the held-out rows are, too."""
    same: bool = state["data"]["contents"] == _rows_digest(trainer)
    return same


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
        "data": _data_order(trainer),
        "log": log_state(trainer),
    }


def _data_order(trainer: Any) -> dict[str, Any]:
    """Everything that determines the next rows and their contents."""
    sampler = trainer.sampler
    return {
        "rows": sampler.rows if sampler is not None else -1,
        "contents": _rows_digest(trainer),
        "seed": sampler.seed if sampler is not None else -1,
        "batch_size": train_batch_size(trainer),
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "ranks": trainer.args.world_size,
    }


def _rows_digest(trainer: Any) -> str:
    """The SHA-256 of all training rows, cached on the trainer; empty for a stream."""
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset):
        return ""
    cached: tuple[Any, str] = getattr(trainer, "_digest", (None, ""))
    if cached[0] is not rows:
        digest = hashlib.sha256()
        for part in rows.with_format("arrow").iter(1000):
            plain = part.replace_schema_metadata(None).combine_chunks()
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
                stream.write_table(plain)
            digest.update(sink.getvalue())
        cached = trainer._digest = (rows, digest.hexdigest())
    return cached[1]


def _write_trainer_state(trainer: Any, folder: Path) -> None:
    """Transformers' own record of the run, with the counters of its callbacks (early stopping)."""
    exported: dict[str, list[Any]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            exported.setdefault(type(callback).__name__, []).append(callback.state())
    # Transformers reads a single state as it is and several of a class as a list
    trainer.state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in exported.items()}
    trainer.state.save_to_json(str(folder / checkpoint.TRAINER_STATE))
