"""Atomic writes: a killed process or a full disk leaves the old bytes or the new ones, never a mixture.

One file (`atomic_file`) or a folder of several (`atomic_directory`) is written under a temporary name beside the
target; every file is flushed to the disk, then the folder that lists them; then it is renamed and the parent flushed.
`rename(2)` is the commit. A folder that exists is *exchanged* with the new one in a single system call (Linux, macOS);
elsewhere it takes two renames, and `recover` repairs a kill between them. What replaces a file or folder has its
owner, mode and extended attributes.

A temporary name starts with `.lorary-tmp-` and is locked (advisory) while its writer lives, so `remove_stale` can tell
leftovers of a killed process from work in progress.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorary.errors import Diagnostic, FileError
from lorary.files.syscalls import (
    abandoned,
    copy_attributes,
    exchange,
    fault_point,
    hold,
    reason,
    sync_folder,
    sync_tree,
)

TEMPORARY = ".lorary-tmp-"
REPLACED = ".lorary-old-"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write, which replaces `path` at the end of the block, as a whole or not at all.

    Args:
        path: the file to create or replace; its folder must exist.

    Raises:
        FileError: the disk is full, or the system refuses; whatever was at `path` is still there, untouched.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_file(target) as file:
    ...     _ = file.write(b"whole")
    >>> target.read_bytes()
    b'whole'
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            hold(file.fileno())
            yield file
            fault_point("file.written")
            file.flush()
            if path.is_file() and not path.is_symlink():
                copy_attributes(path, temporary)
            os.fsync(file.fileno())
            fault_point("file.before-rename")
            os.replace(temporary, path)
        fault_point("file.after-rename")
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    keep: bool = False,
    drop: Collection[str] = (),
    needed: int | None = None,
) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end of the block, as a whole or not at all.

    Args:
        path: the folder to create, with its parents.
        replace: whether a folder that is not empty may be replaced.
        keep: whether other files of the replaced folder stay. It must have no subfolders then, which could not be
            carried over in one step.
        drop: names of files that do not stay.
        needed: the number of bytes to be written, if known, for the message about a full disk.

    Raises:
        FileError: `path` holds something and may not be replaced, the disk is full, or the system refuses.
            What was at `path` is still there, untouched, and nothing is left beside it.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "run" / "step-10"
    >>> with atomic_directory(target) as folder:
    ...     _ = (folder / "weights").write_bytes(b"...")
    >>> sorted(entry.name for entry in target.parent.iterdir())
    ['step-10']
    """
    path = _resolved(path)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}"
    lock, filling = -1, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        _check_target(path, replace, keep)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        hold(lock)
        fault_point("directory.begin")
        filling = True
        yield temporary
        filling = False
        fault_point("directory.written")
        if path.is_dir():
            _copy_attributes(path, temporary)
            if keep:
                _carry_over(path, temporary, drop)
        sync_tree(temporary)
        fault_point("directory.before-rename")
        _commit(temporary, path)
        fault_point("directory.after-rename")
        sync_folder(path.parent)
    except BaseException as error:
        # the caller's own errors pass unchanged, except for a full disk
        if isinstance(error, OSError) and (not filling or error.errno in FULL):
            raise write_error(path, error, needed) from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)
        # after the exchange this is the replaced folder; before it, the unfinished new one
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Create a folder, with its parents, unless it is there.

    Raises:
        FileError: the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def remove_stale(parent: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files and folders that killed writers left in `parent`; return their paths.

    The temporaries of living writers are locked and stay.
    """
    removed = []
    for entry in sorted(Path(parent).glob(f"{TEMPORARY}*")):
        if abandoned(entry):
            remove(entry, ignore_errors=True)
            removed.append(entry)
    return removed


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file, a link or a folder with its contents, if there is one.

    Args:
        path: of the entry; a link is not followed.
        ignore_errors: leave files of a folder that cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


def recover(path: str | os.PathLike[str]) -> bool:
    """Restore the old folder if a kill between the two renames of a replacement left none at `path`.

    Returns:
        whether it was restored.
    """
    path = Path(os.path.abspath(path))
    left = sorted(path.parent.glob(f"{_replaced_name(path)}*")) if path.parent.is_dir() else []
    if not left or not all(abandoned(entry) for entry in path.parent.glob(f"{TEMPORARY}*")):
        return False  # nothing to do, or a writer is at work
    if not path.exists():
        left.pop().rename(path)
        sync_folder(path.parent)
        return True
    for entry in left:  # the new folder is in place: the old one is left to remove
        shutil.rmtree(entry, ignore_errors=True)
    return False


def write_error(path: Path, error: OSError, needed: int | None = None) -> FileError:
    """The error of a write that the system refused, with a remedy.

    Args:
        path: the target.
        error: the system's error.
        needed: the number of bytes to be written, if known.
    """
    what, fix = reason(error), ""
    if error.errno in FULL:
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
        what += f": {free:,} bytes are free" + (f", {needed:,} are needed" if needed is not None else "")
        fix = "free some space (or raise the quota or file-size limit) or choose another folder"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "choose a folder that you may write to"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        fix = "a part of this path is a file, not a folder"
    # a folder in the making has a name that nobody knows, and is gone now
    path = next((p.parent for p in (path, *path.parents) if p.name.startswith(TEMPORARY)), path)
    return FileError(f"cannot write {str(path)!r}; what was there before is unchanged", [Diagnostic("", what, fix)])


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        resolved = Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links before Python 3.13; a null character
        raise _not_writable(path, f"the path cannot be resolved: {error}", "choose another folder") from error
    if Path.cwd().is_relative_to(resolved):
        what = "it is the working directory or contains it, and a replaced folder would take it away"
        raise _not_writable(path, what, "name a folder below it")
    return resolved


def _check_target(path: Path, replace: bool, keep: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise _not_writable(path, "a file of this name is in the way", "choose another name")
    entries = sorted(path.iterdir())
    if entries and not replace:
        raise _not_writable(path, f"the folder is not empty: it holds {entries[0].name!r}", "choose a new folder")
    others = [repr(e.name) for e in entries if not e.is_file() or e.is_symlink()]
    if keep and others:
        what = f"the folder also holds {', '.join(others[:5])}, not a plain file"
        raise _not_writable(path, what, "save into a folder of its own")


def _not_writable(path: str | os.PathLike[str], what: str, fix: str) -> FileError:
    return FileError(f"cannot write {str(path)!r}", [Diagnostic("", what, fix)])


def _copy_attributes(old: Path, new: Path) -> None:
    """Give a new folder and the files in it the attributes of those that they replace."""
    for entry in (new, *new.rglob("*")):
        before = old / entry.relative_to(new)
        if before.exists() and not before.is_symlink() and before.is_dir() == entry.is_dir():
            copy_attributes(before, entry)


def _carry_over(old: Path, new: Path, drop: Collection[str]) -> None:
    for entry in old.iterdir():
        if entry.name not in drop and not (new / entry.name).exists():
            try:
                os.link(entry, new / entry.name)
            except OSError:  # a file system without hard links
                shutil.copy2(entry, new / entry.name)


def _commit(new: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.rename(new, path)  # rename(2) may take the place of an empty folder
    elif not exchange(new, path):
        old = path.parent / f"{_replaced_name(path)}{uuid.uuid4().hex[:12]}"
        os.rename(path, old)
        fault_point("directory.between-renames")
        os.rename(new, path)
        shutil.rmtree(old, ignore_errors=True)


def _replaced_name(path: Path) -> str:
    """The prefix of the temporary names of the folders that `path` replaces."""
    return f"{REPLACED}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"
