"""The model and the trainer of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

import lorary
from lorary.adapters.switch import put_on
from lorary.model.loading.from_pretrained import load_model, load_storage
from lorary.model.out_of_memory import is_out_of_memory
from lorary.train.config.previous_tasks import check_base, path_of
from lorary.train.data.sequence_packing import check_packing
from lorary.train.data.tokenize import Row
from lorary.train.runner.calibration_rows import calibrated
from lorary.train.runner.prepare import RunPlan
from lorary.train.trainer.arguments import training_arguments
from lorary.train.trainer.classification import ClassificationTrainer
from lorary.train.trainer.dpo import DPOTrainer
from lorary.train.trainer.failure_messages import model_too_large
from lorary.train.trainer.grpo import GRPOTrainer
from lorary.train.trainer.kto import KTOTrainer
from lorary.train.trainer.resume import plan_with_saved_start
from lorary.train.trainer.reward import RewardTrainer, with_prompts
from lorary.train.trainer.rng import seeded
from lorary.train.trainer.sft import SFTTrainer

_TRAINERS = {
    "sft": SFTTrainer,
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "grpo": GRPOTrainer,
    "reward": RewardTrainer,
    "classification": ClassificationTrainer,
}


def build_model(prepared: RunPlan, resumed: Path | None = None) -> Any:
    """The base with its method attached; resumed, with the initial factors of the checkpoint."""
    try:
        plan = prepared.plan if resumed is None else plan_with_saved_start(prepared.plan, resumed)
        full = prepared.start.full if prepared.start else ()
        with seeded(prepared.config.training.seed):  # a new head is drawn here
            storage = load_storage(plan.method, full, plan.sites)
            base = load_model(prepared.config.model, storage, plan.quantized, model_class=prepared.base)
        if prepared.start is not None:
            folder = path_of(str(prepared.config.model.adapter))
            put_on(base, prepared.start, folder, trainable=True, fix="set model.id to the base that it was trained on")
            return base
        check_base(prepared.config.method.after, prepared.past, base)
        if resumed is None:
            plan = calibrated(base, plan, prepared)
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
    task, stream = prepared.config.task, prepared.stream
    reference = prepared.config.training.reference
    options = {"labels": prepared.labels, "reward": prepared.reward, "reference": reference}  # of some tasks
    with _no_progress_bars():
        trainer = _TRAINERS[task](
            model=model,
            args=training_arguments(prepared.config, output, held_out=bool(held_out), resumed=resumed),
            train_dataset=stream.dataset() if stream else _dataset(task, prepared.train.rows),
            eval_dataset=_dataset(task, held_out) if held_out else None,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
            **{key: value for key, value in options.items() if value is not None},
        )
    trainer.remove_callback(PrinterCallback)
    if prepared.config.training.torch_compile:
        compile_backbone(model)
    trainer.predicted = prepared.memory
    trainer.stream_digest = stream.digest if stream else ""
    trainer.optimizer_options = dict(prepared.config.training.optimizer_options)
    if prepared.config.data.packing:
        check_packing(model, trainer.data_collator)
    return trainer


def _dataset(task: str, rows: Sequence[Row]) -> Dataset:
    """The rows as the task's trainer takes them."""
    if task == "reward":
        return Dataset.from_list([with_prompts(row) for row in rows])
    if task == "grpo":  # the trainer encodes the prompts
        return Dataset.from_list([{key: value for key, value in row.items() if key != "prompt_ids"} for row in rows])
    return Dataset.from_list(list(rows))


def compile_backbone(model: Any, **options: Any) -> None:
    """Compile the backbone in place.

    The loss selects labelled tokens, whose number changes with every batch: it stays outside. In place, no name of the
    model changes, and Transformers' own option would leave its settings in the environment of later runs.

    Args:
        model: of Transformers.
        options: of `torch.compile`.
    """
    getattr(model, "base_model", model).compile(**options)


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
