"""The memory of a configured run, from the model's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorary.analysis.memory.fixed import persistent_tensors
from lorary.analysis.memory.gpu_fit import GpuRequirement, gpu_requirement
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.model.loading.dtype import load_dtype
from lorary.model.loading.from_pretrained import saved_dtype
from lorary.model.plan import Plan
from lorary.model.reach.inputs import model_inputs
from lorary.train.config.config import Config
from lorary.train.config.starting_adapter import load_start, plan_to_go_on


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
    if planned is None:
        start = load_start(config)
        planned = plan_to_go_on(config, model, start.adapter) if start else config.plan(model)
    work = workload(config, model)
    memory = predict(model, planned, work, config.training.optimizer, inputs=_inputs(model, work))
    return Forecast(model, planned, memory, gpu_requirement(memory, persistent_tensors(model, planned)))


def _inputs(model: Any, work: Workload) -> dict[str, Tensor] | None:
    """The inputs of a model that takes more or other inputs than token ids; None for a plain text model."""
    config = model.config
    tokens = getattr(model, "main_input_name", "input_ids") == "input_ids" and hasattr(config, "vocab_size")
    if tokens and not getattr(config, "is_encoder_decoder", False):
        return None
    found = next(model_inputs(model), None)
    if found is None:
        return None
    shapes = {k: (work.length,) if t.dtype == torch.long else t.shape[1:] for k, t in found.kwargs.items()}
    return {k: torch.empty((work.batch, *shapes[k]), dtype=t.dtype, device="meta") for k, t in found.kwargs.items()}


def learned_positions(model: nn.Module) -> int | None:
    """The tokens of a row that a model with a table of positions can take; None for rotary ones and others."""
    tables = [m for path, m in model.named_modules() if path.endswith(("position_embeddings", ".wpe"))]
    # RoBERTa's first position is the one after its padding index
    sizes = [m.num_embeddings - (0 if (at := m.padding_idx) is None else at + 1) for m in tables if _is_table(m)]
    return min(sizes, default=None)


def _is_table(module: nn.Module) -> TypeGuard[nn.Embedding]:
    return isinstance(module, nn.Embedding)


def dtype_notes(config: Config, advice: str = "") -> list[str]:
    """A note if the weights compute in another precision here than they are saved in, and would on a GPU.

    Args:
        config: of the run.
        advice: at its end; `{}` is the precision.
    """
    saved = saved_dtype(config.model)  # a loaded model's configuration has the precision in which it computes
    if config.model.dtype != "auto" or saved == load_dtype(config.model, SimpleNamespace(dtype=saved)):
        return []
    name = str(saved).removeprefix("torch.")
    note = f"the weights are saved in {name} and compute in float32: this CPU has no {name} arithmetic"
    return [note + advice.format(name)]


def workload(config: Config, model: Any) -> Workload:
    """The micro-batch of a run; DPO and reward models score a preferred and a rejected answer for every row."""
    training, kind = config.training, load_dtype(config.model, model.config)
    batch = training.batch_size * (2 if config.task in ("dpo", "reward") else 1)
    return Workload(
        batch=batch,
        length=min(config.data.max_length, learned_positions(model) or config.data.max_length),
        dtype=kind,
        autocast=training.bf16 and kind == torch.float32,
        padding=not config.data.packing and batch > 1,
        checkpointing=training.gradient_checkpointing,
    )
