"""--to merged: base and adapter as a plain Transformers checkpoint, written file by file."""

from __future__ import annotations

import shlex
import sys

from lorary.cli._export import Export
from lorary.cli._notes import warnings_as_notes
from lorary.cli._precision import check_precision, merge_precisions

OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # of llama.cpp's converter


def write(export: Export) -> None:
    """Write the checkpoint with the class, labels and chat template that the adapter was trained with."""
    from lorary.adapters import export_merged
    from lorary.adapters.hub import CHAT_TEMPLATE
    from lorary.adapters.label_names import read_label_names
    from lorary.adapters.resolve import class_of_base, find_base, read_adapter
    from lorary.model.loading.model_kind import classes

    dtype, onto = export.options.get("dtype", "auto"), export.options.get("onto", "trained")
    check_precision(f"cannot export {export.adapter}:", dtype, onto)
    base = find_base(export.adapter, export.base)
    adapter = read_adapter(export.adapter, base.id)
    section, target = merge_precisions(export.adapter, adapter, base, dtype, onto)
    template = export.adapter / CHAT_TEMPLATE
    with warnings_as_notes():
        export_merged(
            adapter,
            section,
            export.output,
            dtype=target,
            onto=onto,
            force=export.options.get("force", False),
            model_class=class_of_base(section, adapter, read_label_names(export.adapter)),
            chat_template=template if template.is_file() else None,
        )
    name = str(target).removeprefix("torch.")
    print(f"wrote the merged model to {export.output} ({name})", file=sys.stderr)
    if adapter.base.architecture in classes("CAUSAL_LM"):
        out = str(export.output)
        converter = ["python", "convert_hf_to_gguf.py", out, "--outfile", f"{out}.gguf", "--outtype", OUTTYPES[name]]
        print(f"as GGUF, in a checkout of llama.cpp: {shlex.join(converter)}", file=sys.stderr)
