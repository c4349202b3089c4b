"""lorary doctor: a check of this machine: one step of every feature, devices and resources."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "safetensors", "numpy", "pydantic")
GIB = 2**30


class Finding(NamedTuple):
    """One line of the report: `ok`, `warn` (works with a limitation) or `fail` (does not work)."""

    level: str
    what: str
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: devices, threads, memory, disk, and one step of every feature on the built-in model.

    Versions are listed, not compared: whether a release works is found out by using it. Exits with 1 if a check fails.
    """
    findings = []
    for check in (versions, devices, kernels, resources, writing, environment, features):
        for finding in _guarded(check):
            findings.append(finding)
            if not as_json:
                print(f"{finding.level:<5} {finding.what:<12} {finding.detail}", flush=True)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    failures = sum(finding.level == "fail" for finding in findings)
    if failures:
        print(f"{failures} of {len(findings)} checks failed", file=sys.stderr)
        raise typer.Exit(1)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; if it breaks itself, as with a PyTorch that cannot be imported, that is one."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("fail", check.__name__, f"{type(error).__name__}: {error}")


def features() -> Iterator[Finding]:
    """One step of every feature."""
    from lorary.cli._self_tests import run_all

    yield from itertools.starmap(Finding, run_all())


def versions() -> Iterator[Finding]:
    """The versions of Python and the packages."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("lorary", *PACKAGES):
        found = _installed(name)
        if found is not None:
            yield Finding("ok", name, found)
        elif name not in ("peft", "lorary"):
            yield Finding("fail", name, "is not installed; install lorary again")


def devices() -> Iterator[Finding]:
    """The devices and threads of torch."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            detail = f"{torch.cuda.get_device_name(i)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bf16}"
            yield Finding("ok", f"cuda:{i}", detail)
    elif torch.version.cuda:
        yield Finding(
            "warn", "cuda", f"torch is built for CUDA {torch.version.cuda}, but sees no device: check the driver"
        )
    elif torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")
    else:
        yield Finding("ok", "device", "CPU; 16-bit models compute in float32 where the CPU has no 16-bit arithmetic")
    cores, threads = _cores(), torch.get_num_threads()
    level = "warn" if threads > cores else "ok"
    fix = f"; set OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding(level, "threads", f"{threads} on {cores} cores{fix}")


def resources() -> Iterator[Finding]:
    """Free memory and disk space."""
    memory = _memory()
    yield Finding("warn" if memory < 2 * GIB else "ok", "memory", f"{memory / GIB:.1f} GiB free")
    for what, folder in (("disk here", Path.cwd()), ("disk cache", _cache())):
        free = shutil.disk_usage(folder).free
        yield Finding("warn" if free < 5 * GIB else "ok", what, f"{free / GIB:.1f} GiB free")


def writing() -> Iterator[Finding]:
    """Write access to the folders that runs use."""
    for what, folder in (("write here", Path.cwd()), ("write tmp", Path(tempfile.gettempdir()))):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"lorary")
                file.flush()
                os.fsync(file.fileno())
            yield Finding("ok", what, str(folder))
        except OSError as error:
            yield Finding("fail", what, f"{folder}: {error.strerror or error}")


def kernels() -> Iterator[Finding]:
    """The backend for 4-bit weights on the CPU."""
    from lorary.kernels.nf4 import backend

    how = backend()
    if how == "table":
        detail = (
            "4-bit weights are read by PyTorch's own operations, which takes many times as long: install gcc or clang"
        )
        yield Finding("warn", "4 bits", detail)
    else:
        yield Finding("ok", "4 bits", f"weights on the CPU are read by code that is {how}")


def environment() -> Iterator[Finding]:
    """Environment variables that change behaviour."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        yield Finding("ok", "offline", "HF_HUB_OFFLINE is set: only what is cached, built in or in files can be used")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") == "":
        yield Finding("warn", "devices", "CUDA_VISIBLE_DEVICES is empty: every GPU is hidden")
    if _installed("bitsandbytes") is not None and not _has_cuda():
        yield Finding("warn", "bitsandbytes", "works on a CPU, but 8-bit optimizers are slower than torch's there")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _installed(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Free bytes, within the container's limit if there is one."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, max(limit - used, 0))
    except (OSError, ValueError):  # no limit is written as `max`
        return free


def _cache() -> Path:
    """The Hub's cache folder, or its nearest existing parent."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(os.path.expanduser(home)).absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
