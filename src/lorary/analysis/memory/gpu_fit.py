"""The GPU memory of a predicted run: tensors, CUDA context and fragmentation, compared with GPU sizes."""

from __future__ import annotations

from dataclasses import dataclass

from lorary.analysis.memory.memory import Memory

GB = 10**9
SIZES = (8, 12, 16, 24, 48, 80, 141)
"""Sizes of GPUs, in GB. A card of that size has slightly more bytes."""
CONTEXT = 1.4 * GB
"""The CUDA context, the libraries' workspaces and code: included by nvidia-smi, not by PyTorch's own count.
Measured by Unsloth: 1.34 to 1.46 GB; 0.5 on older setups."""
FRAGMENTED = 0.05
"""Share of the memory allocated in every step that fragmentation loses: 3 to 8 % were measured."""
ROUNDING = 512
"""The allocator's granularity for a tensor, in bytes."""


@dataclass(frozen=True)
class GpuRequirement:
    """The GPU memory of a run, in bytes.

    Args:
        tensors: PyTorch's count: the prediction, with every tensor rounded up.
        overhead: CUDA context and fragmentation.
    """

    tensors: int
    overhead: int

    @property
    def total(self) -> int:
        """The total as nvidia-smi shows it."""
        return self.tensors + self.overhead

    def free_bytes(self, size: float) -> int:
        """Free bytes on a GPU of `size` GB; negative if the run does not fit."""
        return int(size * GB) - self.total


def gpu_requirement(memory: Memory, tensors: int = 0) -> GpuRequirement:
    """The GPU memory of a predicted run.

    Args:
        memory: the prediction.
        tensors: number of persistent tensors; each loses half the granularity on average.
    """
    return GpuRequirement(memory.total + tensors * ROUNDING // 2, int(CONTEXT + FRAGMENTED * memory.moving))


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9) with one decimal, or two digits of less than a tenth.

    >>> gigabytes(23_456_000_000), gigabytes(28_200_000)
    ('23.5 GB', '0.028 GB')
    """
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / GB:.2g} GB"
