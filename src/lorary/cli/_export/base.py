"""The adapter of an export and its base without weights, for the forms that need only names, sizes and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorary.cli._export import Export

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.model.loading.source import ModelSection


def adapter_and_base(export: Export) -> tuple[Adapter, PreTrainedModel, ModelSection]:
    """The adapter, its base on the meta device, and which model that is.

    Raises:
        FileError: the adapter cannot be read, or its base cannot be found.
    """
    from lorary.adapters import load_adapter
    from lorary.adapters.resolve import base_class, find_base
    from lorary.model.loading.from_pretrained import skeleton

    adapter = load_adapter(export.adapter)
    section = find_base(export.adapter, export.base)
    return adapter, skeleton(section, base_class(section, export.adapter, adapter)), section


def show_command(command: str) -> None:
    """Print the command that uses an export, on standard error."""
    import sys

    print(f"run it: {command}", file=sys.stderr)
