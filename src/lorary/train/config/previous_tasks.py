"""The adapters of earlier tasks (`method.after`): loaded, and identified by a digest of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, Diagnostic, FileError
from lorary.model.fingerprint import Fingerprint


def path_of(name: str) -> str:
    """The folder of `FOLDER` or `FOLDER#DIGEST`."""
    return name.partition("#")[0]


def load_previous_tasks(names: Sequence[str]) -> list[Adapter]:
    """The adapters of `method.after`; a name with a digest must still hold that adapter.

    Raises:
        FileError: an adapter is missing or damaged.
        ConfigError: digests that do not match; all of them.
    """
    adapters = [load_adapter(path_of(name)) for name in names]
    pairs = zip(names, adapters, strict=True)
    if problems := [p for name, adapter in pairs for p in other_digest("method.after", name, adapter)]:
        raise ConfigError("the adapter of an earlier task has changed:", problems)
    return adapters


def other_digest(key: str, name: str, adapter: Adapter) -> list[Diagnostic]:
    """The error of an adapter that does not have the digest of `FOLDER#DIGEST`; none without a digest."""
    path, _, wanted = name.partition("#")
    if not wanted or wanted == (found := digest(adapter)):
        return []
    what = f"{path} contains another adapter: {found}, and the configuration was made with {wanted}"
    return [Diagnostic(key, what, f"write {path} without a digest to take it as it is now")]


def check_base(names: Sequence[str], adapters: Sequence[Adapter], base: nn.Module) -> None:
    """Refuse earlier tasks that were trained on another base.

    Raises:
        FileError: every difference.
    """
    here = Fingerprint.of(base) if adapters else Fingerprint()
    problems = [
        Diagnostic(path_of(name), problem.what, problem.fix)
        for name, adapter in zip(names, adapters, strict=True)
        for problem in adapter.base.disagreements(here)
    ]
    if problems:
        raise FileError("an earlier task was trained on another base:", problems)


def with_digests(names: Sequence[str], adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The names, each with the digest of its adapter."""
    return tuple(f"{path_of(name)}#{digest(adapter)}" for name, adapter in zip(names, adapters, strict=True))


def digest(adapter: Adapter) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over an adapter's values, independent of its file format."""
    hashed = hashlib.sha256()
    for adapted in adapter.sites:
        hashed.update(f"{adapted.site.name} {adapted.scale!r}".encode())
        for role, tensor in sorted(adapter.tensors[adapted.site.name].items()):
            numbers = tensor.flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
            hashed.update(f"{role} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    for name, tensor in sorted(adapter.full.items()):
        numbers = tensor.contiguous().flatten().view(torch.uint8).numpy()
        hashed.update(f"{name} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return hashed.hexdigest()[:16]
