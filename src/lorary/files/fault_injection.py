"""Fault points: labelled places where a test can kill the process or fill the disk.

A crash test must stop *between* two particular system calls. The writers of this package name those places with
`fault_point("directory.before-rename")`; the environment variable

    LORARY_FAULT="directory.before-rename:kill"        at every passage
    LORARY_FAULT="directory.before-rename:3:kill"      at the third passage only

chooses the fault: `kill` (SIGKILL to this process, as from the kernel's OOM killer), `enospc` (the disk is full) or
`raise` (an ordinary error). Without the variable a fault point is one dictionary lookup.
"""

from __future__ import annotations

import errno
import os
import signal

_passages: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Trigger the fault that `LORARY_FAULT` asks for at this point, if any.

    Raises:
        OSError: the fault is `enospc`.
        RuntimeError: the fault is `raise`.
        ValueError: the variable names another fault.
    """
    wanted = os.environ.get("LORARY_FAULT")
    if not wanted or wanted.split(":", 1)[0] != name:
        return
    *nth, action = wanted.split(":")[1:]
    _passages[name] = _passages.get(name, 0) + 1
    if nth and _passages[name] != int(nth[0]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    elif action == "raise":
        raise RuntimeError(f"the fault asked for at {name}")
    else:
        raise ValueError(f"LORARY_FAULT={wanted!r}: the action is kill, enospc or raise")
