"""The memory of a configured run, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorary.analysis.memory.fixed import persistent_tensors
from lorary.analysis.memory.gpu_fit import GpuRequirement, gpu_requirement
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.model.loading.from_pretrained import load_dtype
from lorary.model.plan import Plan
from lorary.train.config.config import Config


@dataclass(frozen=True)
class Forecast:
    """The memory that a run needs.

    Args:
        model: the base on the meta device.
        plan: of the method on it.
        memory: at the peak.
        need: of a GPU.
    """

    model: nn.Module
    plan: Plan
    memory: Memory
    need: GpuRequirement


def forecast(config: Config, model: nn.Module, planned: Plan | None = None) -> Forecast:
    """The memory of this run.

    Args:
        config: of the run.
        model: the base on the meta device.
        planned: the method's plan for it, if it is known.
    """
    planned = planned or config.method.plan(model)
    memory = predict(model, planned, workload(config, model), config.training.optimizer)
    return Forecast(model, planned, memory, gpu_requirement(memory, persistent_tensors(model, planned)))


def workload(config: Config, model: Any) -> Workload:
    """The micro-batch of a run; DPO scores a preferred and a rejected answer for every row."""
    training, kind = config.training, load_dtype(config.model, model.config)
    batch = training.batch_size * (2 if config.task == "dpo" else 1)
    return Workload(
        batch=batch,
        length=config.data.max_length,
        dtype=kind,
        autocast=training.bf16 and kind == torch.float32,
        padding=not config.data.packing and batch > 1,
        checkpointing=training.gradient_checkpointing,
    )
