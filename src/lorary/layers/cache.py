"""Memo: what a layer works out from its tensors once, and keeps for as long as they stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


# A fused or foreign optimizer may write parameters without raising their version: every step of any optimizer counts.
register_optimizer_step_post_hook(_count)


class TensorCache:
    """Results by name, each with the state of the tensors that it came from."""

    def __init__(self) -> None:
        # the weak references own nothing but an address each: no other storage can be where one of these has been
        self._kept: dict[str, tuple[Any, Tensor, list[StorageWeakRef]]] = {}

    def __reduce__(self) -> Any:  # a copy of a layer has other tensors
        return TensorCache, ()

    def __call__(self, name: str, of: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave before, if no optimizer has stepped and none of the tensors changed since.

        A tensor whose numbers are changed by way of its `.data` outside of an optimizer's step is not noticed.
        """
        if not _trusted(of):
            return make()
        where = ((t._version, t.untyped_storage()._cdata, t.storage_offset(), t.dtype, t.shape) for t in of)
        state = (_steps, *where)
        if name not in self._kept or self._kept[name][0] != state:
            # constants, and normal tensors even in inference mode: the next backward pass may save them
            with torch.inference_mode(False), torch.no_grad():
                self._kept[name] = (state, make(), [StorageWeakRef(t.untyped_storage()) for t in of])
        return self._kept[name][1]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()


def _trusted(tensors: Sequence[Tensor]) -> bool:
    """Whether versions tell of every change: not while compiling, not of inference tensors, and not where shards of
    the parameters are gathered into the same memory time and again (FSDP keeps the versions as they were)."""
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
