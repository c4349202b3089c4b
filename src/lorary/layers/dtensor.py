"""FSDP2's sharded tensors: gather, take the local shard, distribute."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, distributed over the ranks."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Any) -> Tensor:
    """The full tensor on its device, gathered from all ranks if it is sharded; differentiable."""
    return cast(Tensor, tensor.full_tensor() if is_sharded(tensor) else tensor)


def full_cpu_copy(tensor: Tensor) -> Tensor:
    """A detached full copy on the CPU; a collective call. A meta tensor is returned as it is."""
    tensor = full_tensor(tensor.detach())
    return tensor if tensor.is_meta else tensor.to("cpu", copy=True).contiguous()


def local_shard(tensor: Any) -> Tensor:
    """This rank's part of a tensor, a view."""
    return cast(Tensor, tensor.to_local() if is_sharded(tensor) else tensor)


def distribute_like(tensor: Any, value: Tensor) -> Tensor:
    """A full value on the device of a tensor, sharded in the same way."""
    value = value.to(tensor.device)
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements)


def copy_into(tensor: Tensor, value: Tensor) -> None:
    """Copy a full value into a tensor, or this rank's part of it into the shard."""
    with torch.no_grad():
        tensor.copy_(distribute_like(tensor, value.to(tensor.dtype)))
