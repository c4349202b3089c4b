"""A model with its adapter, ready to be used on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorary.model.loading.source import ModelSection


def ready_model(section: ModelSection, folder: Path | None) -> Any:
    """The model in evaluation mode with the adapter of `folder`, on the GPU if there is one."""
    from lorary.adapters.resolve import load_with_adapter

    return _on_device(load_with_adapter(section, folder))


def ready_base(section: ModelSection, folder: Path | None) -> Any:
    """The model in evaluation mode as the adapter of `folder` needs it, without it, on the GPU if there is one."""
    from lorary.adapters.resolve import load_for_adapter

    return _on_device(load_for_adapter(section, folder))


def _on_device(model: Any) -> Any:
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def tokenizer_or_none(section: ModelSection, folder: Path) -> Any:
    """The base's tokenizer with the chat template of the adapter in `folder`, or None if it has none."""
    from lorary.cli._generation import tokenizer_of
    from lorary.cli._notes import print_notes
    from lorary.errors import FileError

    try:
        return tokenizer_of(section, folder)
    except FileError as error:
        print_notes([error.problems[0] if error.problems else error])
        return None
