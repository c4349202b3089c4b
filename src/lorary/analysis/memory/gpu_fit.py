"""Whether it fits: what a GPU of a given size has room for, and what it needs beyond the tensors."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.analysis.memory.memory import Memory

GB = 10**9
SIZES = (8, 12, 16, 24, 48, 80, 141)
"""Of GPUs, in GB. A card of that name has a little more than so many billion bytes."""
CONTEXT = 1.4 * GB
"""The CUDA context, the libraries' workspaces and their code: nvidia-smi shows it, PyTorch's own count does not.
Measured by Unsloth: 1.34 to 1.46 GB; 0.5 on older setups."""
FRAGMENTED = 0.05
"""Of what comes and goes in every step, lost between blocks that do not fit: 3 to 8 % are seen."""
ROUNDING = 512
"""Every tensor on a GPU takes a multiple of so many bytes."""


@dataclass(frozen=True)
class Need:
    """What a run needs of a GPU, in bytes.

    Args:
        tensors: what PyTorch counts: the prediction, each tensor rounded up.
        overhead: the CUDA context, and what fragmentation takes.
    """

    tensors: int
    overhead: int

    @property
    def total(self) -> int:
        """What nvidia-smi shows."""
        return self.tensors + self.overhead

    def room(self, size: float) -> int:
        """Bytes that stay free on a GPU of so many GB; below zero where it does not fit."""
        return int(size * GB) - self.total


def need(memory: Memory, tensors: int = 0) -> Need:
    """What a predicted run needs of a GPU.

    Args:
        memory: the prediction.
        tensors: how many tensors stay from step to step: each loses half of a rounding on average.
    """
    return Need(memory.total + tensors * ROUNDING // 2, int(CONTEXT + FRAGMENTED * memory.moving))


def gigabytes(size: float) -> str:
    """Bytes as GB, one digit: what cards are sold by.

    >>> gigabytes(23_456_000_000)
    '23.5 GB'
    """
    return f"{size / GB:.1f} GB"
