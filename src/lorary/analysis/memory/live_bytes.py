"""Counting bytes of tensors exactly: what autograd keeps for backward, and the most that is alive at once.

Both count storages, each once, whatever number of views look at it; so both work on any device, also on fake
tensors, which have sizes but no memory. Neither sees what a kernel takes and frees within one operator, nor
what an allocator rounds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_for_backward(run: Callable[[], object], beyond: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps alive for the backward pass of one forward pass.

    Args:
        run: makes the forward pass.
        beyond: tensors whose memory is not counted: the input, the parameters.

    Returns:
        Bytes of all the storages saved, in full even where only a view of one was saved, without `beyond`.

    Example:
        >>> kept_for_backward(lambda: layer(x), beyond=[x, *layer.parameters()])
    """
    known = {_address(tensor) for tensor in beyond}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        if (address := _address(tensor)) not in known:
            kept[address] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # noqa: F841 (alive until the count is done)
        return sum(storage.nbytes() for storage in kept.values())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all living tensors that were made inside, and the most there were at once.

    Attributes:
        now: bytes alive at this moment.
        peak: the most bytes alive at once since the start or since `restart_peak()`.

    Example:
        >>> with LiveBytes() as live:
        ...     loss(model(x)).backward()
        >>> live.peak
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a storage alive: its bytes, 0 if it was there before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operation inside imports the compiler, which takes seconds

    def restart_peak(self) -> None:
        """Begins a new search for the highest point, from what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._meet(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor, counted=True)
        return result

    def _meet(self, tensor: Tensor, counted: bool) -> None:
        address = _address(tensor)
        if address in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[address] = size = storage.nbytes() if counted else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._sizes.pop(address, 0)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
