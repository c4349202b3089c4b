"""Opening a file of an adapter folder: plain files of that folder only, one descriptor, a bounded size.

What a path names may change between a check and its use, so every check is made on the descriptor that is
then read. Nothing is ever memory-mapped: a file cut short while it is read gives a sentence, not a dead
process.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from lorary.errors import Diagnostic, FileError, did_you_mean
from lorary.files.atomic import recover
from lorary.files.strict_json import show


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The adapter folder that `path` names, symbolic links resolved.

    Raises:
        FileError: there is none, or it is something else than a folder.
    """
    headline = f"cannot load {subject(path)}"
    try:
        recover(path)
        folder = Path(path).resolve(strict=True)
    except FileNotFoundError:
        parent, name = Path(path).parent, Path(path).name
        beside = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        fix = did_you_mean(name, beside) if beside else "check the path"
        raise FileError(headline, [Diagnostic("", "there is no such folder", fix)]) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(headline, [Diagnostic("", f"the path cannot be followed: {error}")]) from None
    if not folder.is_dir():
        raise FileError(headline, [Diagnostic("", "it is a file, and an adapter is a folder", "name its folder")])
    return folder


def subject(path: str | os.PathLike[str]) -> str:
    """What is read, as messages name it."""
    return f"the adapter {show(os.fspath(path), most=400)}"


def open_inside(folder: Path, name: str, limit: int) -> tuple[BinaryIO, int]:
    """Opens the plain file `name` of `folder` for reading.

    Args:
        folder: a resolved folder.
        name: the file's name in it.
        limit: the most bytes that it may have.

    Returns:
        the open file, unbuffered, and its size in bytes at this moment.

    Raises:
        FileError: the file is missing, leaves the folder, is no plain file, or is too large. It never blocks.
    """
    path = _contained(folder, name)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its other end. O_NOFOLLOW: the path is resolved
        # already.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
    except OSError as error:
        what = os.strerror(error.errno).lower() if error.errno else str(error)
        raise FileError("", [Diagnostic(name, f"cannot be opened: {what}")]) from error
    status = os.fstat(descriptor)
    what = ""
    if not stat.S_ISREG(status.st_mode):
        what = f"is a {_sort(status.st_mode)}, not a plain file"
    elif status.st_size > limit:
        what = f"is {status.st_size:,} bytes, more than the {limit:,} that are accepted"
    if what:
        os.close(descriptor)
        raise FileError("", [Diagnostic(name, what)])
    return os.fdopen(descriptor, "rb", buffering=0), status.st_size


def read_exactly(file: BinaryIO, buffer: memoryview, where: str) -> None:
    """Fills `buffer` from the file's position.

    Raises:
        FileError: the file ended before: it was cut short while it was being read.
    """
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise FileError("", [Diagnostic(where, "the file became shorter while it was being read")])
        done += count


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a small plain file of `folder`, as checked as `open_inside` does."""
    file, size = open_inside(folder, name, limit)
    with file:
        data = bytearray(size)
        read_exactly(file, memoryview(data), name)
        return bytes(data)


def _contained(folder: Path, name: str) -> Path:
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        what = "is a link to nothing" if (folder / name).is_symlink() else "is missing"
        raise FileError("", [Diagnostic(name, what)]) from None
    except RuntimeError:  # how Python < 3.13 reports a loop of links
        raise FileError("", [Diagnostic(name, "is a link to itself")]) from None
    except OSError as error:
        what = "is a link to itself" if error.errno == errno.ELOOP else f"cannot be followed: {error.strerror}"
        raise FileError("", [Diagnostic(name, what)]) from None
    inside = path.is_relative_to(folder)
    # The Hugging Face cache keeps a snapshot's files as links into the repository's own `blobs` folder.
    if folder.parent.name == "snapshots":
        inside = inside or path.is_relative_to(folder.parent.parent / "blobs")
    if not inside:
        fix = "copy the file itself into the folder"
        raise FileError("", [Diagnostic(name, "is a link that leaves the folder", fix)])
    return path


def _sort(mode: int) -> str:
    sorts = [
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "named pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    ]
    return next((word for is_a, word in sorts if is_a(mode)), "special file")
