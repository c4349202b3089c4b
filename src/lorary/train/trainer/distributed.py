"""More than one process: which ways of dividing the work lorary supports, and FSDP2 on CPUs."""

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

T = TypeVar("T")


def processes() -> PartialState:
    """Which process this is, of how many. Without an accelerator accelerate has to be told to go by CPUs."""
    return PartialState(cpu=on_cpus())


def on_cpus() -> bool:
    """Whether there is nothing here but CPUs."""
    return not torch.accelerator.is_available()


def on_main_process(work: Callable[[], T]) -> T:
    """Does some work in the first process alone and gives its result, or its error, to all."""
    outcome: list[Any] = [None, None]
    if processes().is_main_process:
        try:
            outcome = [work(), None]
        except LoraryError as error:
            outcome = [None, error]
    if processes().num_processes > 1:
        broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    found: T = result
    return found


def refuse_shares() -> None:
    """Layers that train one set of tensors in common cannot be sharded.

    FSDP2 shards the tensors of a layer together with the layer: what two layers hold it would have to shard twice.

    Raises:
        TrainingError: always.
    """
    what = "shards every layer with its tensors, and those of layers that share (LoRA-drop) would be in two shards"
    problem = Diagnostic("fsdp", what, "train with DDP, or without LoRA-drop")
    raise TrainingError("unsupported distributed setup:", [problem])


def check_strategy(state: Any) -> None:
    """Refuses ways of distributing that cannot train an adapter.

    Args:
        state: accelerate's.

    Raises:
        TrainingError: each with its reason.
    """
    found = []
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        what = "version 1 flattens adapter and base into one parameter"
        found.append(Diagnostic("fsdp", what, "set version: 2 in fsdp_config"))
    if getattr(state, "deepspeed_plugin", None) is not None:
        found.append(Diagnostic("deepspeed", "its shards cannot be put into lorary's checkpoints", "use FSDP2"))
    if found:
        raise TrainingError("unsupported distributed setup:", found)


def fsdp_on_cpus(state: Any, settings: dict[str, Any] | None) -> bool:
    """Makes accelerate shard over processes that have no accelerator.

    accelerate 1.15 takes FSDP's settings into account only where every process has a device of its own; with CPUs
    alone it goes on with DDP. PyTorch's FSDP2 itself works over gloo.

    Args:
        state: accelerate's, just made.
        settings: of FSDP, as Transformers reads them from its arguments; None where `accelerate launch` may have
            left them in the environment.

    Returns:
        whether it had to.
    """
    wanted = settings is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not wanted or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return True


def resharded(model: nn.Module) -> nn.Module:
    """The same model, each of its parameters this rank's shard again.

    After a forward pass without a backward pass (an evaluation) FSDP2 leaves some of them gathered: other objects
    than the optimizer knows, whose values nobody would train.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model
