"""What a run is put together from: the model with its method attached, and the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

import lorary
from lorary.model.loading.from_pretrained import load_model, load_storage
from lorary.train.config.previous_tasks import check_base
from lorary.train.data.sequence_packing import check_packing
from lorary.train.run.prepare import RunPlan
from lorary.train.trainer.arguments import arguments
from lorary.train.trainer.dpo import DPOTrainer
from lorary.train.trainer.failure_messages import out_of_memory, too_large
from lorary.train.trainer.resume import begun
from lorary.train.trainer.sft import SFTTrainer


def model_of(prepared: RunPlan, resumed: Path | None = None) -> Any:
    """The base with its method attached; of a run that goes on from a checkpoint, where its adapters started."""
    try:
        plan = prepared.plan if resumed is None else begun(prepared.plan, resumed)
        base = load_model(prepared.config.model, load_storage(plan.method), plan.quantized)
        check_base(prepared.config.method.after, prepared.past, base)
        return lorary.attach(base, plan, seed=prepared.config.training.seed)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise too_large(error, prepared.memory) from error


def trainer_of(prepared: RunPlan, model: Any, output: Path, *, resumed: bool, callbacks: list[TrainerCallback]) -> Any:
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
