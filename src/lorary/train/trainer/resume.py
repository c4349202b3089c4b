"""What a trainer keeps and finds again: the adapter in the model, and everything that decides how it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers.trainer_callback import ExportableState

import lorary
from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, FileError, LoraryError, TrainingError
from lorary.files.findings import AdapterWarning
from lorary.layers.adapted import adapted_layers
from lorary.layers.dtensor import copy_into as put_into
from lorary.layers.dtensor import full_cpu_copy
from lorary.model.fingerprint import Fingerprint
from lorary.model.plan import Plan
from lorary.model.rank_pruning import directions_of
from lorary.model.residual_base import load_start
from lorary.model.state import base_parameter, require
from lorary.spec.placement import start_name
from lorary.train.trainer import checkpoint, optimizer_state, rng

_log = logging.getLogger("lorary.train")


def taken(model: nn.Module, fingerprint: Fingerprint) -> Adapter:
    """A copy of the adapter in a model. Under FSDP every rank has to call this: it gathers.

    Args:
        model: with a method attached, its parameters whole or sharded.
        fingerprint: of the base, taken while it was whole.
    """
    return dataclasses.replace(Adapter.of(model), base=fingerprint)


def adapter_of(path: Path) -> Adapter:
    """The adapter of a checkpoint. It may well change nothing yet, as after a first step of the warmup."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        return load_adapter(path / checkpoint.ADAPTER)


def begun(plan: Plan, path: Path) -> Plan:
    """The plan with the start that a checkpoint's adapter had, where the base gives up a part for it (PiSSA, OLoRA).

    Found again with other threads or on another machine it differs in its last bits, and a base that has been packed
    or sharded by then cannot give up another part.
    """
    if not any(p.starts for p in plan.sites):
        return plan
    tensors = adapter_of(path).tensors
    given = dict(plan.fixed_tensors)
    for p in plan.sites:
        start = {start_name(role) for role in p.starts}
        known = {role: t for role, t in tensors.get(p.site.name, {}).items() if role in start}
        given[p.site.name] = {**plan.fixed_tensors.get(p.site.name, {}), **known}
    return dataclasses.replace(plan, fixed_tensors=given)


def tell_directions(best: Adapter, step: int, ranks: Mapping[str, int]) -> None:
    """Says so where the best checkpoint is from before a rule had taken directions out (AdaLoRA's budget).

    Args:
        best: its adapter.
        step: when it was written.
        ranks: site -> how many directions the run has ended with; empty where no rule takes any out.
    """
    here, there = sum(ranks.values()), sum(map(directions_of, best.compact().sites))
    if ranks and there > here:
        text = "the best checkpoint is that of step %d, when there were %d directions; the run has ended with %d"
        _log.warning(text, step, there, here)


def put(model: nn.Module, value: Adapter) -> None:
    """Copies an adapter's tensors into those of a model, which stay the objects that an optimizer knows.

    Raises:
        FileError: it is another method's, or for other sites; every difference.
    """
    state, layers = require(model, "load"), adapted_layers(model)
    here = {p.site.name: p.stored for p in state.sites}
    there = {name: {role: tuple(t.shape) for role, t in roles.items()} for name, roles in value.tensors.items()}
    problems = [
        Diagnostic(name, f"{there.get(name, 'nothing')} in the checkpoint, {here.get(name, 'nothing')} here")
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    only = sorted(set(value.full) ^ set(state.full))
    problems += [Diagnostic(name, f"trains only {'here' if name in state.full else 'there'}") for name in only]
    if problems:
        raise FileError("the checkpoint holds another adapter:", problems)
    for name, layer in layers.items():
        for role, parameter in layer.params.items():
            put_into(parameter, value.tensors[name][role])
        load_start(model, layer, value.tensors[name])
    for name, tensor in value.full.items():
        put_into(base_parameter(model, name), tensor)


def save(trainer: Any, path: Path) -> None:
    """Writes a checkpoint; every rank calls it and gives what it alone knows, the first one writes.

    Raises:
        LoraryError: on every rank, if the first one could not write: nobody is left to wait.
    """
    model = trainer.plain_model()
    state = _state(trainer, model)
    adapter = taken(model, trainer.fingerprint)
    failure: list[LoraryError | None] = [None]
    if trainer.args.should_save:
        facts = {"step": trainer.state.global_step, "lorary": lorary.__version__}
        try:
            checkpoint.write(path, adapter, state, facts, lambda folder: _record(trainer, folder), model)
            best = trainer.state.best_model_checkpoint
            checkpoint.rotate(path.parent, trainer.args.save_total_limit, best)
        except LoraryError as error:
            failure = [error]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def choose(trainer: Any, wanted: str | bool) -> Path:
    """The checkpoint to resume from, the same on every rank; the log says which newer ones were passed over.

    Args:
        trainer: the trainer.
        wanted: a checkpoint folder, or True for the newest complete one in the trainer's output folder.

    Raises:
        FileError: there is none, or it is incomplete.
    """
    found: list[Any] = [None, ()]
    if trainer.args.process_index == 0:
        if isinstance(wanted, bool):
            found = list(checkpoint.newest(Path(trainer.args.output_dir)))
        elif Path(wanted).is_dir():
            found = [Path(wanted), ()]
    path, skipped = broadcast_object_list(found)
    for sentence in skipped:
        _log.warning("%s", sentence)
    if path is None:
        where = trainer.args.output_dir if isinstance(wanted, bool) else wanted
        problem = Diagnostic(str(where), "holds no complete checkpoint", "start without resuming")
        raise FileError("cannot resume this run:", [problem])
    _log.info("resuming from %s", path.name)
    chosen: Path = path
    return chosen


def restore_optimizer(trainer: Any, state: dict[str, Any]) -> None:
    """Puts the optimizer, the schedule and the scaler back, if the data goes on where it was left.

    Raises:
        TrainingError: rows, batches or the optimizer are not those of the checkpoint.
    """
    there, here = state["data"], _geometry(trainer)
    differ = [k for k in here if there[k] != here[k]]
    problems = [Diagnostic(k, f"{there[k]} in the checkpoint, {here[k]} here") for k in differ if k != "contents"]
    if "contents" in differ:
        fix = "restore the data that the run began with, or start again"
        problems.append(Diagnostic("contents", "the training rows are not those of the checkpoint", fix))
    if problems:
        raise TrainingError("this checkpoint belongs to another run:", problems)
    optimizer_state.restore(inner(trainer.optimizer), trainer.plain_model(), state["optimizer"])
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])


def has_rows(trainer: Any, state: dict[str, Any]) -> bool:
    """Whether the training rows are those of the checkpoint, which held the same others out then."""
    same: bool = state["data"]["contents"] == _digest(trainer)
    return same


def restore_log(trainer: Any, log: dict[str, Any]) -> None:
    """Puts back what has been summed since the last line of the log, so that the next line is the same."""
    trainer._tr_loss += log["loss"]
    trainer._total_loss_scalar, trainer._globalstep_last_logged = log["total"], log["at"]
    trainer._metrics["train"].update({k: list(v) for k, v in log["metrics"].items()})
    trainer._total_train_tokens = log["tokens"]


def _state(trainer: Any, model: nn.Module) -> dict[str, Any]:
    scaler = trainer.accelerator.scaler
    return {
        "optimizer": optimizer_state.capture(inner(trainer.optimizer), model),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "rng": gather_object([rng.capture()]),
        "rules": {k: full_cpu_copy(t) for k, t in trainer.rules.state_dict().items()},
        "data": _geometry(trainer),
        "log": {
            "loss": float(trainer._tr_loss),
            "total": trainer._total_loss_scalar,
            "at": trainer._globalstep_last_logged,
            "metrics": {k: [float(v) for v in values] for k, values in trainer._metrics["train"].items()},
            "tokens": trainer._total_train_tokens,
        },
    }


def _geometry(trainer: Any) -> dict[str, Any]:
    """What decides which rows come next, and what is in them."""
    sampler = trainer.sampler
    return {
        "rows": sampler.rows if sampler is not None else -1,
        "contents": _digest(trainer),
        "seed": sampler.seed if sampler is not None else -1,
        "batch_size": trainer._train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "ranks": trainer.args.world_size,
    }


def _digest(trainer: Any) -> str:
    """SHA-256 over all training rows, taken once; empty for rows that are no table (a stream)."""
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset):
        return ""
    known: tuple[Any, str] = getattr(trainer, "_digest", (None, ""))
    if known[0] is not rows:
        digest = hashlib.sha256()
        for part in rows.with_format("arrow").iter(1000):
            plain = part.replace_schema_metadata(None).combine_chunks()
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
                stream.write_table(plain)
            digest.update(sink.getvalue())
        known = trainer._digest = (rows, digest.hexdigest())
    return known[1]


def _record(trainer: Any, folder: Path) -> None:
    """Transformers' own record of the run, with the counters of its callbacks (early stopping)."""
    exported: dict[str, list[Any]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            exported.setdefault(type(callback).__name__, []).append(callback.state())
    # one of a kind stands alone, several in a list: that is how Transformers reads them
    trainer.state.stateful_callbacks = {k: v[0] if len(v) == 1 else v for k, v in exported.items()}
    trainer.state.save_to_json(str(folder / checkpoint.RECORD))


def inner(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
