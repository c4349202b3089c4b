"""Labelled points at which a test can kill the process or fill the disk; inert in everyday use.

A crash test has to die *between* two particular system calls. The writers of this package name those places
with `fault_point("directory.before-rename")`; the environment variable

    LORARY_FAULT="directory.before-rename:kill"        at every passage
    LORARY_FAULT="directory.before-rename:3:kill"      at the third passage only

says what happens there: `kill` (SIGKILL to this very process, as the kernel's OOM killer would), `enospc`
(the disk is full) or `raise` (an ordinary error). Without the variable a fault point is one dictionary
lookup.
"""

from __future__ import annotations

import errno
import os
import signal

_passages: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Does nothing, unless `LORARY_FAULT` names this point: then what it asks for.

    Raises:
        OSError: where the variable asks for `enospc`.
        RuntimeError: where it asks for `raise`.
        ValueError: where the variable itself cannot be understood.
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
