"""C code, compiled once for this processor with the installed C compiler.

The first use compiles it, in about a second, into the user's cache folder (`$XDG_CACHE_HOME/lorary` or
`~/.cache/lorary`); later processes load the library from there. Its file name holds a digest of the source, compiler,
options and processor, since different machines may share the folder, and a digest of the file itself, since a damaged
library would kill the process. Callers have a way without it: there may be no compiler and no writable folder, and
`LORARY_NATIVE=0` asks for none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

THREADS = Path(__file__).with_name("threads.h")
SHARE = 2**19  # numbers per thread, at least

Library = TypeVar("Library")


def wanted() -> bool:
    """Whether compiled code may be used."""
    return os.environ.get("LORARY_NATIVE") != "0"


def threads(numbers: int) -> int:
    """How many threads a job of so many numbers is worth."""
    return max(1, min(torch.get_num_threads(), numbers // SHARE))


def first_that_works(
    load: Callable[[Path], Library],
    works: Callable[[Library], bool],
    sources: Sequence[Path],
    options: tuple[str, ...],
) -> Library | None:
    """The library, compiled for this very processor if possible; None if it cannot be built or gives wrong results.

    Args:
        load: opens the file.
        works: whether its results are right.
        sources: the C file and the headers it includes.
        options: of the compiler.
    """
    for more in (("-march=native",), ("-mcpu=native",), ()):
        try:
            compiled = load(compile_library(sources, options + more))
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
        if works(compiled):
            return compiled
    return None


def compile_library(sources: Sequence[Path], options: tuple[str, ...]) -> Path:
    """The compiled file in the user's cache folder, built if it does not exist.

    Args:
        sources: the C file and the headers it includes.
        options: of the compiler.

    Raises:
        OSError: without a compiler or a folder that only this user can write to.
        subprocess.SubprocessError: if the compiler fails.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler found")
    source, seen = b"".join(path.read_bytes() for path in sources), os.stat(compiler)
    identity = (os.path.realpath(compiler), seen.st_size, seen.st_mtime_ns)
    key = (source, *identity, options, platform.machine(), sorted(cpu_features()))
    folder = _cache_folder()
    start = f"{sources[0].stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}-"
    if intact := [path for path in sorted(folder.glob(f"{start}*.so")) if _is_intact(path)]:
        return intact[0]
    # written under another name first, so that a concurrent process sees all of the file or none
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *options, "-o", name, str(sources[0])]
        subprocess.run(command, check=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        os.chmod(name, 0o700)
        path = folder / f"{start}{_digest(Path(name))}.so"
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _is_intact(path: Path) -> bool:
    """Whether the file is undamaged and only this user can write it."""
    try:
        return path.is_file() and _only_ours(path) and path.stem.endswith(f"-{_digest(path)}")
    except OSError:
        return False


def _only_ours(path: Path) -> bool:
    seen = path.stat()
    return not hasattr(os, "getuid") or (seen.st_uid == os.getuid() and not seen.st_mode & 0o022)


def _cache_folder() -> Path:
    """The folder for compiled files; only this user may write to it, because its files are executed."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path("~").expanduser() / ".cache") / "lorary"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _only_ours(folder):
        raise PermissionError(f"{folder} can be written by others")
    return folder


@lru_cache
def cpu_features() -> frozenset[str]:
    """The processor's feature flags from `/proc/cpuinfo`; empty if there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())
