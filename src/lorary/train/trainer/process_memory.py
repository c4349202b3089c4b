"""How much memory this process takes, as the system or the device's allocator counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def current_bytes() -> int:
    """Bytes in use: of the device where there is one, else of the process."""
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else _status("VmRSS")


def peak_bytes() -> int:
    """The most bytes in use since `restart`; since the process began, where the system cannot start anew."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if _STATUS.exists():
        return _status("VmHWM")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> None:
    """Begins a new search for the highest point."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: then the highest point is that of the whole process
        return


def _status(field: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    for row in text.splitlines():
        if row.startswith(f"{field}:"):
            return int(row.split()[1]) * 1024
    return 0
