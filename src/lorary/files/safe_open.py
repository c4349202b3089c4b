"""Safe opening of an adapter folder's files: plain files of that folder only, one descriptor, a bounded size.

What a path names may change between a check and its use, so every check is made on the descriptor that is then read.
Nothing is memory-mapped: a file truncated while it is read raises an error and does not kill the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorary.errors import Diagnostic, FileError, did_you_mean, not_a
from lorary.files import strict_json
from lorary.files.atomic import recover
from lorary.files.strict_json import show
from lorary.files.syscalls import reason

_SINGLE_FILES = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def checked_path(path: Any, headline: str) -> str:
    """A path from a user, as text.

    Raises:
        FileError: it is not a path.
    """
    problems = not_a(str | os.PathLike, "a path", folder=path)
    text = "" if problems else os.fspath(path)
    problems += not_a(str, "a text", folder=text)
    if not problems and "\0" in text:
        problems.append(Diagnostic("", "the path cannot be followed: it holds a null character"))
    if problems:
        raise FileError(headline, problems)
    return cast(str, text)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """The adapter folder that `path` names, symbolic links resolved.

    Raises:
        FileError: it does not exist, or is not a folder.
    """
    headline = f"cannot load {subject(path)}"
    try:
        if not os.path.lexists(path):  # else its neighbours need not be listed: there may be thousands
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
        raise FileError(headline, [why_no_folder(folder)])
    return folder


def why_no_folder(path: Path) -> Diagnostic:
    """Why something else than a folder, which exists, is not an adapter."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return Diagnostic("", f"it is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a file or a folder")
    kinds = " or ".join(_SINGLE_FILES)
    if path.suffix.lower() in _PICKLES:
        what = "it is a pickle by its name, which can run code when it is read; it was not opened"
        return Diagnostic("", what, f"save it as {_SINGLE_FILES[0]} with the tool that wrote it")
    return Diagnostic(
        "", "it is a file, and an adapter is a folder", f"name its folder, or a file that ends in {kinds}"
    )


def is_single_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a file that may be an adapter by itself."""
    return os.fspath(path).lower().endswith(_SINGLE_FILES) and os.path.isfile(path)


def subject(path: str | os.PathLike[str]) -> str:
    """An adapter folder's name in messages."""
    return f"the adapter {show(os.fspath(path), most=400)}"


def open_inside(folder: Path, name: str, limit: int) -> tuple[BinaryIO, int]:
    """The plain file `name` of `folder`, open for reading and unbuffered, and its size in bytes.

    Args:
        folder: a resolved folder.
        name: the file's name in it.
        limit: the largest accepted size in bytes.

    Raises:
        FileError: the file is missing, leaves the folder, is not a plain file, or is too large. It never blocks.
    """
    # O_NONBLOCK: opening a FIFO must not wait for its other end; O_NOFOLLOW: the path is resolved already
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = -1
    if os.sep not in name:  # a file of the folder itself, if it is no link: then there is nothing to resolve
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / name, flags)
    try:
        descriptor = os.open(_contained(folder, name), flags) if descriptor < 0 else descriptor
    except OSError as error:
        raise _refused(name, f"cannot be opened: {reason(error)}") from error
    status = os.fstat(descriptor)
    what = ""
    if not stat.S_ISREG(status.st_mode):
        what = f"is a {_KINDS.get(stat.S_IFMT(status.st_mode), 'special file')}, not a plain file"
    elif status.st_size > limit:
        what = f"is {status.st_size:,} bytes, more than the {limit:,} that are accepted"
    if what:
        os.close(descriptor)
        raise _refused(name, what)
    return os.fdopen(descriptor, "rb", buffering=0), status.st_size


def read_exactly(file: BinaryIO, buffer: memoryview, where: str) -> None:
    """Fill `buffer` from the file's position.

    Raises:
        FileError: the file was truncated while it was being read.
    """
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise _refused(where, "the file became shorter while it was being read")
        done += count


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a small plain file of `folder`, with the checks of `open_inside`."""
    file, size = open_inside(folder, name, limit)
    with file:
        data = bytearray(size)
        read_exactly(file, memoryview(data), name)
        return bytes(data)


def read_json(folder: Path, name: str, limit: int) -> object:
    """The value in a folder's JSON file, with the checks of `open_inside` and strict JSON.

    Raises:
        FileError: the file or its JSON is not acceptable.
    """
    data = read_bytes(folder, name, limit)
    try:
        return strict_json.parse(data, limit)
    except ValueError as error:
        raise _refused(name, str(error)) from None


def _contained(folder: Path, name: str) -> Path:
    """The resolved path of a file that does not leave the folder."""
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        raise _refused(name, "is a link to nothing" if (folder / name).is_symlink() else "is missing") from None
    except RuntimeError:  # a loop of links, before Python 3.13
        raise _refused(name, "is a link to itself") from None
    except OSError as error:
        loop = error.errno == errno.ELOOP
        raise _refused(name, "is a link to itself" if loop else f"cannot be followed: {error.strerror}") from None
    # the Hugging Face cache keeps a snapshot's files as links into the repository's own `blobs` folder
    snapshots = next((p for p in folder.parents[:2] if p.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots is not None else folder
    if not path.is_relative_to(folder) and not path.is_relative_to(blobs):
        raise _refused(name, "is a link that leaves the folder", "copy the file itself into the folder")
    return path


def _refused(name: str, what: str, fix: str = "") -> FileError:
    return FileError("", [Diagnostic(name, what, fix)])
