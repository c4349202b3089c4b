"""--to peft: a plain LoRA, or a DoRA, in PEFT's two files."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lorary.cli._export import Export
from lorary.cli._export.base import write_exported_card
from lorary.cli._notes import warnings_as_notes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter


def write(export: Export) -> None:
    """Write PEFT's two files and, where the base is given, compare their function with the adapter's."""
    import lorary
    from lorary.adapters import export_peft, load_adapter
    from lorary.adapters.resolve import find_base, load_base, read_adapter
    from lorary.analysis.merge_check import logits
    from lorary.cli._comparison_rows import random_rows

    folded = export.options.get("folded", False)
    if export.base is None:
        value = read_adapter(export.adapter)
        with warnings_as_notes():
            export_peft(value, export.output, folded=folded)
        _write_beside(export, value)
        return
    section = find_base(export.adapter, export.base, "float32")
    model = load_base(section, export.adapter, read_adapter(export.adapter, export.base), quantized=False)
    lorary.load(model, export.adapter)
    (row,) = random_rows(model.config.get_text_config().vocab_size, 1, 64)
    before = logits(model, row)
    lorary.detach(model)
    value = load_adapter(export.adapter, model=model)
    with warnings_as_notes():
        export_peft(value, export.output, model=model, folded=folded)
    _write_beside(export, value, model)
    if value.method.context is not None and value.method.context.config_overrides:  # not stored in PEFT's files
        value.method.context.apply(model).make_permanent()
    lorary.load(model, export.output)
    difference = (before - logits(model, row)).abs().max().item()
    print(f"compared with the adapter: logits differ by at most {difference:.2g} in fp32", file=sys.stderr)


def _write_beside(export: Export, adapter: Adapter, model: PreTrainedModel | None = None) -> None:
    """The model card, and the adapter's tokenizer if it has one: PEFT's files do not name added tokens."""
    from lorary.adapters.export.carried_files import carry_tokenizer

    carry_tokenizer(export.adapter.resolve(), export.output)
    write_exported_card(export.output, adapter, model)
