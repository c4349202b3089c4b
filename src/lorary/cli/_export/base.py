"""The adapter of an export and its base without weights, for the forms that need only names, sizes and settings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lorary.cli._export import Export
from lorary.files.findings import AdapterWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.model.loading.source import ModelSection


def adapter_and_base(export: Export) -> tuple[Adapter, PreTrainedModel, ModelSection]:
    """The adapter, its base on the meta device, and which model that is.

    Raises:
        FileError: the adapter cannot be read, or its base cannot be found.
    """
    from lorary.adapters.resolve import base_class, find_base, read_adapter
    from lorary.model.loading.from_pretrained import skeleton

    section = find_base(export.adapter, export.base)
    adapter = read_adapter(export.adapter, section.id)
    return adapter, skeleton(section, base_class(section, export.adapter, adapter)), section


def write_exported_card(folder: Path, adapter: Adapter, model: PreTrainedModel | None = None) -> None:
    """Write the model card of an export in PEFT's form: of the adapter that is in the folder, made from another one.

    Without the base, adapters of fused experts cannot be read back from PEFT's files: the card is that of the source.
    """
    import dataclasses

    from lorary.adapters import load_adapter
    from lorary.adapters.card import write_card
    from lorary.adapters.content_hash import content_hash
    from lorary.adapters.provenance import Parent, Provenance
    from lorary.spec.interfaces import has_rank
    from lorary.spec.presets import presets_of

    method = ", ".join(presets_of(adapter.method))
    made = Provenance("export", (Parent(sha256=content_hash(adapter)),), {"method": method})
    written = adapter.compact()  # a method without a rank is written as what it is; only the base knows its layers
    readable = model is not None or not any(adapted.site.experts for adapted in adapter.sites)
    if readable and any(has_rank(adapted.delta) for adapted in adapter.sites):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # the export has said it
            written = load_adapter(folder, model=model)
    write_card(folder, dataclasses.replace(written, base=adapter.base, provenance=made))


def show_command(command: str) -> None:
    """Print the command that uses an export, on standard error."""
    import sys

    print(f"run it: {command}", file=sys.stderr)
