"""The predicted memory of one step, for the micro-batch that it had."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from lorary.analysis.memory.predict import predict
from lorary.model.loading.from_pretrained import skeleton
from lorary.model.plan import Plan
from lorary.train.config.config import Config
from lorary.train.runner.memory_forecast import workload

if TYPE_CHECKING:
    from lorary.train.trainer.step_memory import CountedStep


def of_step(config: Config, plan: Plan, step: CountedStep) -> int | None:
    """The predicted bytes of a step that was counted; None if the model's code cannot run without values."""
    model = skeleton(config.model)
    batch = dataclasses.replace(
        workload(config, model), batch=step.batch, length=step.length, padding=step.padded, labelled=step.labelled
    )
    memory = predict(model, plan, batch, optimizer_of(config))
    return None if memory.activations is None else memory.total


def optimizer_of(config: Config) -> str:
    """The optimizer whose memory counts: without a GPU nothing is paged."""
    name = config.training.optimizer
    return name if torch.cuda.is_available() else name.removeprefix("paged_")
