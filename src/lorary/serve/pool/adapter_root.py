"""The folder below which a server's users may name adapters, and nothing outside of it."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

from lorary.adapters.hub import OWN_FILES, RECORDS
from lorary.errors import Diagnostic, FileError
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show

_LEVEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_MOST_LEVELS, _MOST_CHARACTERS = 3, 200
_SETTLED = 2 * 10**9  # ns: a folder changed more recently may change again without another time stamp
_TICK = 2 * 10**7  # ns: file systems count in ticks of 1 to 10 ms

Stamp = tuple[tuple[str, int, int, int], ...]


def invalid_name(name: object) -> str:
    """Why an adapter cannot have this name; empty if it can."""
    if not isinstance(name, str):
        return f"is a {type(name).__name__}, not a text"
    if not name or len(name) > _MOST_CHARACTERS:
        return f"has {len(name):,} characters; a name has 1 to {_MOST_CHARACTERS}"
    levels = name.split("/")
    if len(levels) > _MOST_LEVELS or not all(_LEVEL.fullmatch(level) for level in levels):
        return (
            f"{show(name)} is not made of letters, digits, `.`, `_` and `-`, in at most {_MOST_LEVELS} parts with `/`"
        )
    return ""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, good or bad."""
    return any(os.path.isfile(folder / name) for name in RECORDS)


def stamp(folder: Path) -> Stamp:
    """What changes when an adapter's files do: name, inode, size and time of each; empty if there are none."""
    found = []
    for name in OWN_FILES:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):
            continue
        found.append((name, status.st_ino, status.st_size, status.st_ctime_ns))
    return tuple(found)


def changed_at(folder: str | os.PathLike[str]) -> float:
    """The Unix time at which a file was last added to a folder, removed or replaced; 0 if there is no such folder."""
    try:
        return os.stat(folder).st_mtime
    except (OSError, ValueError):
        return 0.0


def wait_for_a_tick(found: Stamp) -> None:
    """Let the file system's clock go on if files have just been written: a later write gets another time then."""
    left = max((changed for *_, changed in found), default=0) + _TICK - time.time_ns()
    if 0 < left <= _TICK:
        time.sleep(left / 1e9)


class _Listing(NamedTuple):
    """What a folder held when it had this time of change."""

    changed: int
    adapters: tuple[str, ...]
    others: tuple[str, ...]  # folders that hold no adapter: perhaps a team's


class AdapterRoot:
    """A folder whose adapters are served under their paths in it: `french`, `team/french`.

    Args:
        folder: the folder.

    Raises:
        FileError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(checked_path(folder, "cannot serve from this root:")).resolve()
        if not self.folder.is_dir():
            what = f"{show(str(folder))} is not a folder"
            raise FileError("cannot serve from this root:", [Diagnostic("root", what, "create it, or name another")])
        self._listings: dict[str, _Listing] = {}
        self._lock = threading.Lock()

    def confine(self, path: str) -> Path:
        """The folder that a user names, resolved; relative paths begin at the root.

        Raises:
            FileError: it is not below the root; whether it exists there is not said.
        """
        text = checked_path(path, "cannot load the adapter:")
        outside = Diagnostic("", f"{show(text)} is not below the server's folder of adapters", "name a folder in it")
        parts = Path(text).parts
        if ".." in parts or len(text) > 4096:
            raise FileError("cannot load the adapter:", [outside])
        try:
            found = (self.folder / text).resolve()
        except (OSError, RuntimeError, ValueError):
            raise FileError("cannot load the adapter:", [outside]) from None
        if found == self.folder or not found.is_relative_to(self.folder):
            raise FileError("cannot load the adapter:", [outside])
        return found

    def find(self, name: str) -> Path | None:
        """The folder of an adapter's name; None if there is none."""
        if invalid_name(name):
            return None
        try:
            folder = self.confine(name)
        except FileError:
            return None
        return folder if is_adapter(folder) else None

    def names(self) -> list[str]:
        """The names of all adapters in it. Folders that have not changed are not looked into again."""
        with self._lock:
            seen = dict[str, _Listing]()
            names = sorted(self._below("", seen))
            self._listings = seen
        return names

    def _below(self, prefix: str, seen: dict[str, _Listing]) -> list[str]:
        try:
            listing = self._listing(prefix)
        except OSError:  # removed meanwhile, or not readable
            return []
        seen[prefix] = listing
        names = [prefix + name for name in listing.adapters]
        for name in listing.others:
            if is_adapter(self.folder / prefix / name):  # since: that changes its own time, not its parent's
                names.append(prefix + name)
            elif prefix.count("/") < _MOST_LEVELS - 1:
                names += self._below(f"{prefix}{name}/", seen)
        return names

    def _listing(self, prefix: str) -> _Listing:
        folder = self.folder / prefix
        changed = os.stat(folder).st_mtime_ns
        known = self._listings.get(prefix)
        if known is not None and known.changed == changed:
            return known
        adapters, others = list[str](), list[str]()
        with os.scandir(folder) as entries:
            for entry in entries:
                if _LEVEL.fullmatch(entry.name) and entry.is_dir():
                    inside = not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(self.folder)
                    if inside:
                        (adapters if is_adapter(Path(entry.path)) else others).append(entry.name)
        settled = time.time_ns() - changed > _SETTLED
        return _Listing(changed if settled else -1, tuple(adapters), tuple(others))
