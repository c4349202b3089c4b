"""TensorCache: values derived from tensors, valid until a tensor changes."""

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


# Fused and third-party optimizers may write parameters without raising their versions, so every step invalidates.
register_optimizer_step_post_hook(_count)


class TensorCache:
    """Cached results by name, each with the state of the tensors that it was computed from."""

    def __init__(self) -> None:
        # the weak references keep the addresses in use, so that no other storage can have them
        self._entries: dict[str, tuple[Any, Tensor, list[StorageWeakRef]]] = {}

    def __reduce__(self) -> Any:  # a copied layer has other tensors
        return TensorCache, ()

    def __call__(self, name: str, of: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """The cached result of `make`, recomputed after any optimizer step or change of a tensor in `of`.

        Changes through `.data` outside an optimizer step are not detected.
        """
        if not _versions_are_reliable(of):
            return make()
        state = _steps, *((t._version, t.untyped_storage()._cdata, t.storage_offset(), t.dtype, t.shape) for t in of)
        if name not in self._entries or self._entries[name][0] != state:
            # normal tensors even in inference mode, because a later backward pass may save them
            with torch.inference_mode(False), torch.no_grad():
                self._entries[name] = (state, make(), [StorageWeakRef(t.untyped_storage()) for t in of])
        return self._entries[name][1]

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


def _versions_are_reliable(tensors: Sequence[Tensor]) -> bool:
    """Whether versions reveal every change: not while compiling, not for inference tensors, not under FSDP.

    FSDP gathers parameters into the same memory again and again without raising their versions.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return False
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
