"""The adapters of earlier tasks that a configuration names (`method.after`): read, and told apart by what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, Diagnostic, FileError
from lorary.model.fingerprint import Fingerprint

_DIGITS = 16


def path_of(name: str) -> str:
    """The folder in `FOLDER` or `FOLDER#DIGEST`."""
    return name.partition("#")[0]


def past_of(names: Sequence[str]) -> list[Adapter]:
    """The adapters that `method.after` names, each as it was when it was named with its digest.

    Raises:
        FileError: there is none, or it is damaged.
        ConfigError: one is another than the one whose digest stands behind its name; all of them.
    """
    adapters = [load_adapter(path_of(name)) for name in names]
    problems = []
    for name, adapter in zip(names, adapters, strict=True):
        path, _, wanted = name.partition("#")
        if wanted and wanted != (found := digest(adapter)):
            what = f"{path} holds another adapter: {found}, and the configuration was made with {wanted}"
            problems.append(Diagnostic("method.after", what, f"write {path} alone to take it as it is now"))
    if problems:
        raise ConfigError("the adapter of an earlier task has changed:", problems)
    return adapters


def check_base(names: Sequence[str], adapters: Sequence[Adapter], base: nn.Module) -> None:
    """Refuses earlier tasks of other weights, which a plan without any could not tell.

    Raises:
        FileError: each of them.
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
    """The same names, each with the digest of its adapter."""
    return tuple(f"{path_of(name)}#{digest(adapter)}" for name, adapter in zip(names, adapters, strict=True))


def digest(adapter: Adapter) -> str:
    """The first 16 digits of a SHA-256 over the values, whatever file they are kept in."""
    hashed = hashlib.sha256()
    for p in adapter.sites:
        hashed.update(f"{p.site.name} {p.scale!r}".encode())
        for role, tensor in sorted(adapter.tensors[p.site.name].items()):
            numbers = tensor.flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
            hashed.update(f"{role} {tuple(tensor.shape)}".encode() + numbers.tobytes())
    return hashed.hexdigest()[:_DIGITS]
