"""Memory of this process: on the device if there is one, else in the machine's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch


def current_bytes() -> int:
    """Bytes in use."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most bytes in use since `reset_peak`; since the start of the process on systems that cannot reset it."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Start a new peak measurement."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return
