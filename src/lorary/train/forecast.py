"""The memory of a configured run, before anything is read but the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorary.footprint.fixed import tensors
from lorary.footprint.memory import Memory
from lorary.footprint.prediction import predict
from lorary.footprint.room import Need, need
from lorary.footprint.workload import Workload
from lorary.plans import Plan
from lorary.train.config import Config
from lorary.train.models import dtype


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Args:
        model: the base's shapes.
        plan: what the method does to it.
        memory: of the fullest moment.
        work: the micro-batch.
        simulated: whether a step was run without data, because no formula knows the model.
    """

    model: nn.Module
    plan: Plan
    memory: Memory
    work: Workload
    simulated: bool = False

    @property
    def need(self) -> Need:
        """Of a GPU."""
        return need(self.memory, tensors(self.model, self.plan))


def forecast(config: Config, model: nn.Module) -> Forecast:
    """The memory of this run, in closed form; by a step on the meta device where no formula knows the model.

    Args:
        config: of the run.
        model: the base's shapes.
    """
    planned, work = config.method.plan(model), workload(config, model)
    memory = predict(model, planned, work, config.training.optimizer)
    if memory.activations is None and hasattr(model, "forward"):
        return Forecast(model, planned, simulated(config, model, planned), work, True)
    return Forecast(model, planned, memory, work)


def simulated(config: Config, model: nn.Module, planned: Plan) -> Memory:
    """The same by one step without data: exact for any model, and slow."""
    from lorary.train.memory import estimate

    work = workload(config, model)
    return estimate(
        model,
        planned,
        batch=work.batch,
        length=work.length,
        dtype=work.dtype,
        gradient_checkpointing=work.checkpointing,
        padding=work.padding,
        optimizer=config.training.optimizer,
    )


def workload(config: Config, model: Any) -> Workload:
    """The micro-batch of a run. DPO scores a preferred and a rejected answer for every row."""
    training, kind = config.training, dtype(config.model, model.config)
    return Workload(
        batch=training.batch_size * (2 if config.task == "dpo" else 1),
        length=config.data.max_length,
        dtype=kind,
        autocast=training.bf16 and kind == torch.float32,
        padding=not config.data.packing and training.batch_size > 1,
        checkpointing=training.gradient_checkpointing,
    )
