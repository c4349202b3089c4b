"""Exact byte counts of tensors: saved by autograd for the backward pass, and the peak of live tensors.

Storages are counted once each, however many views share them, so both work on any device, including fake tensors.
Workspaces inside an operator and the allocator's rounding are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.torch_internals import TorchDispatchMode, storage_id, tree_leaves


def kept_for_backward(run: Callable[[], object], beyond: Iterable[Tensor] = ()) -> int:
    """The bytes that autograd saves in one forward pass.

    Args:
        run: the forward pass.
        beyond: tensors that are not counted: the input, the parameters.

    Returns:
        The bytes of all saved storages, in full even if only a view was saved, without `beyond`.

    Example:
        >>> kept_for_backward(lambda: layer(x), beyond=[x, *layer.parameters()])
    """
    excluded = {storage_id(tensor) for tensor in beyond}
    saved: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that addresses are not reused

    def pack(tensor: Tensor) -> Tensor:
        if (address := storage_id(tensor)) not in excluded:
            saved[address] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # noqa: F841 (alive until the count is done)
        return sum(storage.nbytes() for storage in saved.values())


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all live tensors created within the context, and their peak.

    Attributes:
        now: bytes alive now.
        peak: the most bytes alive at once since the start or `restart_peak()`.

    Example:
        >>> with LiveBytes() as live:
        ...     loss(model(x)).backward()
        >>> live.peak
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # address of a live storage -> its bytes; 0 if older than the context

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operation inside imports the compiler, which takes seconds

    def restart_peak(self) -> None:
        """Restart the peak at the current bytes."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._track(tensor, counted=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track(tensor, counted=True)
        return result

    def _track(self, tensor: Tensor, counted: bool) -> None:
        address = storage_id(tensor)
        if address in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[address] = size = storage.nbytes() if counted else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._sizes.pop(address, 0)
