"""Trained adapters: as values, as folders of lorary, PEFT and mlx-lm, and switched on a model.

The names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.adapters.export.engines import export_for_engine as export_for_engine
    from lorary.adapters.export.gguf import export_gguf as export_gguf
    from lorary.adapters.export.merged import export_merged as export_merged
    from lorary.adapters.export.ollama import export_ollama as export_ollama
    from lorary.adapters.peft.export import export_peft as export_peft
    from lorary.adapters.save_load import load_adapter as load_adapter
    from lorary.adapters.save_load import save_adapter as save_adapter
    from lorary.files.findings import AdapterWarning as AdapterWarning

_HOMES = {
    "AdapterWarning": "files.findings",
    "export_for_engine": "adapters.export.engines",
    "export_gguf": "adapters.export.gguf",
    "export_merged": "adapters.export.merged",
    "export_ollama": "adapters.export.ollama",
    "export_peft": "adapters.peft.export",
    "load_adapter": "adapters.save_load",
    "save_adapter": "adapters.save_load",
}
__all__ = [
    "AdapterWarning",
    "export_for_engine",
    "export_gguf",
    "export_merged",
    "export_ollama",
    "export_peft",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorary.adapters' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lorary.{_HOMES[name]}"), name)
