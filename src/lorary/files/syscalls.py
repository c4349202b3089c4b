"""What the atomic writer asks of the operating system: exchanging, flushing and locking."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: no advisory locks, so nothing is ever held to be stale
    fcntl = None  # type: ignore[assignment]


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two names in one system call; False where the system or the file system has none."""
    if os.environ.get("LORARY_NO_EXCHANGE"):  # lets the tests walk the other way on any system
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
    """Flushes every file below a folder, and every folder, to the disk."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flushes the list of a folder's names to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened for this
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(descriptor: int) -> None:
    """Locks an open file or folder for as long as it stays open: its writer lives."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks: then nothing there can be told to be stale
            return


def abandoned(entry: Path) -> bool:
    """Whether nobody holds this file or folder any more; False where that cannot be known."""
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
