"""System calls of the atomic writer: exchange, flush and lock; and fault points between them.

A crash test must stop *between* two particular system calls. The writers of this package name those places with
`fault_point("directory.before-rename")`; the environment variable

    LORARY_FAULT="directory.before-rename:kill"        at every passage
    LORARY_FAULT="directory.before-rename:3:kill"      at the third passage only

chooses the fault: `kill` (SIGKILL to this process, as from the kernel's OOM killer), `enospc` (the disk is full) or
`raise` (an ordinary error). Without the variable a fault point is one dictionary lookup.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: without advisory locks nothing counts as stale
    fcntl = None  # type: ignore[assignment]

_passages: dict[str, int] = {}  # of fault points


def reason(error: OSError) -> str:
    """The system's reason for an error, in lower case."""
    return os.strerror(error.errno).lower() if error.errno else str(error)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one system call; False if the system or the file system has none."""
    if os.environ.get("LORARY_NO_EXCHANGE"):  # lets the tests take the other way on any system
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(here, paths[0], here, paths[1], exchange) == 0)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(*paths, 2) == 0)  # RENAME_SWAP
    return False


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to the disk."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the list of a folder's names to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_attributes(old: Path, new: Path) -> None:
    """Give a new file or folder the owner, mode and extended attributes (ACLs, labels) of the one that it replaces.

    An attribute that the system does not let this process set keeps the value of a new file.
    """
    status, here = old.stat(), new.stat()
    for owner, group in ((status.st_uid, -1), (-1, status.st_gid)):
        if owner not in (-1, here.st_uid) or group not in (-1, here.st_gid):
            with suppress(OSError):  # of another user, or a group that this one is not in
                os.chown(new, owner, group)
    with suppress(OSError, AttributeError):  # file systems, and systems, without them
        for name in os.listxattr(old):
            with suppress(OSError):
                os.setxattr(new, name, os.getxattr(old, name))
    with suppress(OSError):
        os.chmod(new, stat.S_IMODE(status.st_mode))  # last: a change of the group clears bits


def hold(descriptor: int) -> None:
    """Lock an open file or folder until it is closed, as a sign that its writer lives."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks: nothing there counts as stale
            return


def abandoned(entry: Path) -> bool:
    """Whether no process holds the lock of this file or folder; False if unknown."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


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
