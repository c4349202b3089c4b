"""Bytes on disk: lorary's own folders, PEFT's, and the atomic writing under both.

The names below are loaded when they are first used: the atomic writer alone needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.formats.adapters import export_peft as export_peft
    from lorary.formats.adapters import load_adapter as load_adapter
    from lorary.formats.adapters import save_adapter as save_adapter
    from lorary.formats.findings import AdapterWarning as AdapterWarning

_HOMES = {
    "AdapterWarning": "findings",
    "export_peft": "adapters",
    "load_adapter": "adapters",
    "save_adapter": "adapters",
}
__all__ = ["AdapterWarning", "export_peft", "load_adapter", "save_adapter"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorary.formats' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorary.formats.{_HOMES[name]}"), name)
