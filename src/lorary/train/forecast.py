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
        need: of a GPU.
        simulated: whether a step was run without data, because no formula knows the model.
    """

    model: nn.Module
    plan: Plan
    memory: Memory
    work: Workload
    need: Need
    simulated: bool = False


def forecast(config: Config, model: nn.Module, planned: Plan | None = None) -> Forecast:
    """The memory of this run, in closed form; by a step on the meta device where no formula knows the model.

    Args:
        config: of the run.
        model: the base's shapes.
        planned: what the method does to it, where that is known.
    """
    planned, work = planned or config.method.plan(model), workload(config, model)
    memory = predict(model, planned, work, config.training.optimizer)
    steps = memory.activations is None and _can_run(model)
    if steps:
        memory = simulated(config, model, planned)
    return Forecast(model, planned, memory, work, need(memory, tensors(model, planned)), steps)


def _can_run(model: nn.Module) -> bool:
    """Whether it is a model, and not shapes alone."""
    return type(model).forward is not nn.Module.forward


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
