"""Errors of allocators: which ones they are, and what they say."""

from __future__ import annotations

import torch

# Allocators that raise a plain RuntimeError: PyTorch's for CPUs, its one for Apple's GPUs, and C++ itself.
_ALLOCATOR_ERRORS = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in the machine's own memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATOR_ERRORS)


def allocator_message(error: BaseException) -> str:
    """The first line of an allocator's message, without the location in PyTorch's source."""
    text = str(error).strip().splitlines()
    return text[0].rpartition("] . ")[2].rpartition("err == 0. ")[2] if text else "there is no memory left"
