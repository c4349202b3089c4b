"""Engines in this process: Transformers' own `load_adapter`, and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from lorary.analysis.verify.observed import Observed, observe
from lorary.errors import Diagnostic, LoraryError


class Here:
    """An engine in this process, on a copy of the base.

    Args:
        name: transformers or peft.
        base: the base, without an adapter.
        folder: the adapter's folder.

    Raises:
        LoraryError: the engine does not read the folder, with its own sentence.
    """

    def __init__(self, name: str, base: nn.Module, folder: Path) -> None:
        self.name, self.base = name, base
        self.release = " ".join(f"{package} {_version(package)}" for package in dict.fromkeys((name, "peft")))
        try:
            self.adapted: Any = _READERS[name](copy.deepcopy(base), str(folder)).eval()
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:300]
            what = f"it does not read this folder: {type(error).__name__}: {said}"
            fix = f"lorary check {folder} --for {name}"
            raise LoraryError(f"cannot verify against {name}", [Diagnostic(str(folder), what, fix)]) from error

    def observe(self, ids: Sequence[int], *, adapted: bool) -> list[Observed]:
        return [observe(self.adapted if adapted else self.base, ids)]

    def has_base(self) -> bool:
        return True


def _by_transformers(base: Any, folder: str) -> Any:
    base.load_adapter(folder)
    return base


def _by_peft(base: Any, folder: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


_READERS: dict[str, Callable[[Any, str], Any]] = {"transformers": _by_transformers, "peft": _by_peft}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
