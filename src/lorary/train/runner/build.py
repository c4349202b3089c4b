"""The model and the trainer of a run."""

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
from lorary.train.runner.prepare import RunPlan
from lorary.train.trainer.arguments import training_arguments
from lorary.train.trainer.dpo import DPOTrainer
from lorary.train.trainer.failure_messages import is_out_of_memory, model_too_large
from lorary.train.trainer.resume import plan_with_saved_start
from lorary.train.trainer.sft import SFTTrainer


def build_model(prepared: RunPlan, resumed: Path | None = None) -> Any:
    """The base with its method attached; resumed, with the initial factors of the checkpoint."""
    try:
        plan = prepared.plan if resumed is None else plan_with_saved_start(prepared.plan, resumed)
        base = load_model(prepared.config.model, load_storage(plan.method), plan.quantized)
        check_base(prepared.config.method.after, prepared.past, base)
        return lorary.attach(base, plan, seed=prepared.config.training.seed)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise model_too_large(error, prepared.memory) from error


def build_trainer(
    prepared: RunPlan, model: Any, output: Path, *, resumed: bool, callbacks: list[TrainerCallback]
) -> Any:
    """The trainer of a run.

    Args:
        prepared: the run.
        model: with its method attached.
        output: the folder of the checkpoints.
        resumed: whether the run continues.
        callbacks: Transformers' callbacks.
    """
    held_out = prepared.held_out.rows if prepared.held_out else ()
    if "tensorboard" in prepared.config.training.report_to:
        from lorary.train.trainer.tensorboard import TensorBoardInFolder  # an extra

        callbacks = [*callbacks, TensorBoardInFolder(output.parent / "tensorboard")]
    patience = prepared.config.training.early_stopping_patience
    if patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=patience)]
    trainer_class = DPOTrainer if prepared.config.task == "dpo" else SFTTrainer
    with _no_progress_bars():
        trainer = trainer_class(
            model=model,
            args=training_arguments(prepared.config, output, held_out=bool(held_out), resumed=resumed),
            train_dataset=Dataset.from_list(list(prepared.train.rows)),
            eval_dataset=Dataset.from_list(list(held_out)) if held_out else None,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.predicted = prepared.memory
    if prepared.config.data.packing:
        check_packing(model, trainer.data_collator)
    return trainer


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A context without the progress bars of `datasets`, for short operations."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()
