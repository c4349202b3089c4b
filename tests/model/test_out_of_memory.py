"""Which errors are an allocator's."""

from __future__ import annotations

import torch

from lorary.model.out_of_memory import allocator_message, is_out_of_memory


def test_which_errors_are_about_memory() -> None:
    for spent in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("std::bad_alloc")):
        assert is_out_of_memory(spent)
    for other in (RuntimeError("shapes do not match"), ValueError("DefaultCPUAllocator: can't allocate memory")):
        assert not is_out_of_memory(other)
    assert allocator_message(MemoryError()) == "there is no memory left"
