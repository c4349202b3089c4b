"""Whether a checkpoint belongs to a trainer's run: its base, its rows, its batches, and the machine's facts."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import pyarrow
from datasets import Dataset

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, TrainingError
from lorary.train.trainer import environment
from lorary.train.trainer.trainer_internals import make_sampler

_log = logging.getLogger("lorary.train")
_DIGESTS = {"contents": "the training rows", "held_out": "the held-out rows"}  # key in the state -> in words


def check(trainer: Any, adapter: Adapter, state: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, and log what has changed on the machine.

    Args:
        trainer: the trainer that is to continue.
        adapter: of the checkpoint.
        state: the training state of the checkpoint.

    Raises:
        TrainingError: the base, the rows or the batches differ; every difference.
    """
    there, here = state["data"], data_order(trainer)
    differ = [k for k in here if k in there and there[k] != here[k]]  # older checkpoints have fewer
    problems = [Diagnostic(k, f"{there[k]} in the checkpoint, {here[k]} here") for k in differ if k not in _DIGESTS]
    fix = "restore the run's original data, or start again"
    problems += [Diagnostic(k, f"{_DIGESTS[k]} are not those of the checkpoint", fix) for k in differ if k in _DIGESTS]
    fix = "resume on the base that the run began with, or start again"
    problems += [Diagnostic(p.where, p.what, fix) for p in adapter.base.disagreements(trainer.fingerprint)]
    if problems:
        raise TrainingError("this checkpoint belongs to another run:", problems)
    changed = environment.changes(state.get("environment", {}), environment.environment())
    if changed:
        _log.warning("the rest of the run may differ in its last bits (%s)", "; ".join(changed))


def has_same_rows(trainer: Any, state: dict[str, Any]) -> bool:
    """Whether the training rows are those of the checkpoint, so that the held-out rows are, too."""
    same: bool = state["data"]["contents"] == data_order(trainer)["contents"]
    return same


def data_order(trainer: Any) -> dict[str, Any]:
    """Everything that determines the next rows and their contents, and those of evaluations."""
    if trainer.sampler is None:
        make_sampler(trainer)  # sets it, unless the order is not lorary's
    sampler, digests = trainer.sampler, trainer.row_digests
    return {
        "rows": sampler.rows if sampler is not None else -1,
        "contents": digests.of(trainer.train_dataset) or trainer.stream_digest,
        "held_out": digests.of(trainer.eval_dataset),
        "seed": sampler.seed if sampler is not None else -1,
        "batch_size": trainer.args.train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "ranks": trainer.args.world_size,
        **trainer.compared_at_resume,
    }


class RowDigests:
    """The SHA-256 of all rows of a data set, computed once for each; empty for a stream, or if there is none."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, str]] = []

    def of(self, rows: Any) -> str:
        """The digest of a data set, or of several by name."""
        if isinstance(rows, dict):
            return " ".join(f"{name}:{self.of(part)}" for name, part in sorted(rows.items()))
        if not isinstance(rows, Dataset):
            return ""
        for known, digest in self._known:
            if known is rows:
                return digest
        self._known.append((rows, _digest(rows)))
        return self._known[-1][1]


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for part in rows.with_format("arrow").iter(1000):
        plain = part.replace_schema_metadata(None).combine_chunks()
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        digest.update(sink.getvalue())
    return digest.hexdigest()
