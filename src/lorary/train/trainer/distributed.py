"""Several processes: the supported strategies, and FSDP2 on CPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lorary.errors import Diagnostic, LoraryError, TrainingError
from lorary.train.trainer.trainer_internals import set_distributed_type

T = TypeVar("T")


def this_process() -> PartialState:
    """accelerate's state of this process: its rank, and the number of processes."""
    return PartialState(cpu=cpu_only())  # accelerate does not detect several processes on CPUs by itself


def cpu_only() -> bool:
    """Whether this machine has no accelerator."""
    return not torch.accelerator.is_available()


def on_main_process(work: Callable[[], T]) -> T:
    """The result of `work`, run in the first process and sent to all; every process raises its error."""
    outcome: list[Any] = [None, None]
    if this_process().is_main_process:
        try:
            outcome = [work(), None]
        except LoraryError as error:
            outcome = [None, error]
    if this_process().num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def refuse_sharding_shared_layers() -> None:
    """Refuse FSDP2 for layers that share tensors, since it shards each layer with its own.

    Raises:
        TrainingError: always.
    """
    what = "shards every layer with its tensors, and those of layers that share (LoRA-drop) would be in two shards"
    problem = Diagnostic("fsdp", what, "train with DDP, or without LoRA-drop")
    raise TrainingError("unsupported distributed setup:", [problem])


def check_strategy(state: Any) -> None:
    """Refuse distributed strategies that cannot train an adapter.

    Args:
        state: accelerate's.

    Raises:
        TrainingError: all unsupported settings, with reasons.
    """
    problems = []
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        what = "version 1 flattens adapter and base into one parameter"
        problems.append(Diagnostic("fsdp", what, "set version: 2 in fsdp_config"))
    if getattr(state, "deepspeed_plugin", None) is not None:
        problems.append(Diagnostic("deepspeed", "its shards cannot be put into lorary's checkpoints", "use FSDP2"))
    if problems:
        raise TrainingError("unsupported distributed setup:", problems)


def enable_fsdp_on_cpus(state: Any, settings: dict[str, Any] | None) -> bool:
    """Make accelerate shard over processes without an accelerator; returns whether that was necessary.

    accelerate 1.15 applies FSDP's settings only where every process has a device of its own and falls back to DDP on
    CPUs. PyTorch's FSDP2 itself works over gloo.

    Args:
        state: accelerate's, just created.
        settings: FSDP's, as Transformers parses them; None if only `accelerate launch` may have set them, in the
            environment.
    """
    wanted = settings is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not wanted or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    set_distributed_type(state, DistributedType.FSDP)
    return True


def reshard(model: nn.Module) -> nn.Module:
    """The same model with every parameter sharded.

    After a forward pass without a backward pass (an evaluation) FSDP2 leaves some parameters gathered: tensors that
    the optimizer does not hold and that no training step would change.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model
