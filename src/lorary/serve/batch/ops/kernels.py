"""The kernels for many short segments, by device."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lorary.serve.batch.ops import cpu


class Kernels(Protocol):
    """Computes the short segments of a layer in one call.

    Attributes:
        types: the dtypes that they compute in.
    """

    @property
    def types(self) -> Sequence[torch.dtype]: ...

    def short(self, width: int) -> int:
        """The most rows of a segment for kernels, where in + out = width; longer ones take matrix products."""
        ...

    def prepare(self, pieces: Sequence[tuple[int, int, int, float]], rows: int, device: torch.device) -> Any:
        """Pieces (slot, start, stop, weight) of a step of so many rows, as `add_rows` takes them."""
        ...

    def add_rows(self, table: Tensor, layer: int, pieces: Any, x: Tensor, y: Tensor) -> None:
        """Add the terms of a layer to y [rows, out], in place, for x [rows, in]; both are contiguous.

        Args:
            table: [slots, layers, FIELDS] of an `AdapterTable`.
            layer: the index of the layer.
            pieces: of `prepare`.
            x, y: of a dtype in `types` that the adapters' tensors have, too.
        """
        ...


def kernels_for(device: torch.device) -> Kernels | None:
    """The kernels of a device; None if there are none, so that matrix products compute all segments."""
    if device.type == "cpu":
        return cpu.native()
    return _launcher() if device.type == "cuda" and importlib.util.find_spec("triton") else None


@lru_cache
def _launcher() -> Kernels:
    from lorary.serve.batch.ops.triton import Launcher  # where Triton is installed

    return Launcher()
