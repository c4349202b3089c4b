"""Tensors that FSDP2 keeps in shards: the whole of one, a rank's own part, and a whole one as such shards again."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a shard only (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor where it is, gathered from all ranks if it is sharded; gradients flow back through it."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def full_cpu_copy(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU, gathered from all ranks; every rank has to call it. On the meta device: itself."""
    tensor = full_tensor(tensor.detach())
    return tensor if tensor.is_meta else tensor.to("cpu", copy=True).contiguous()


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, a view."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def distribute_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value on the device of a tensor, and in shards as it is."""
    value = value.to(tensor.device)
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    spec = cast(Any, tensor)
    return distribute_tensor(value, spec.device_mesh, spec.placements)


def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor, or into this rank's shard of it."""
    with torch.no_grad():
        tensor.copy_(distribute_like(tensor, value.to(tensor.dtype)))
