"""Ollama: a Modelfile beside the adapter's GGUF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.export import gguf
from lorary.adapters.export.ollama_template import chat_format
from lorary.adapters.export.plain_factors import MERGE
from lorary.adapters.peft.writer import rope_overrides
from lorary.errors import Diagnostic, FileError, not_a
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show

NAME = "Modelfile"
BASE = "./base.gguf"


def export_ollama(
    adapter: Adapter,
    folder: str | os.PathLike[str],
    *,
    model: nn.Module,
    tokenizer: Any = None,
    base_gguf: str = BASE,
    dtype: str = "float32",
) -> None:
    """Write `adapter.gguf` and the Modelfile from which `ollama create` makes a model of the base and the adapter.

    The Modelfile has a TEMPLATE only where it renders every conversation as the tokenizer's chat template does (apart
    from spaces at the ends of a message, which some templates strip). Otherwise a comment says why, and Ollama takes
    the one that the base's GGUF holds.

    Args:
        adapter: the adapter.
        folder: a new folder, or one whose two files are to be replaced.
        model: the base, as for `export_gguf`.
        tokenizer: of the base, with the chat template that the adapter was trained with.
        base_gguf: the base in Ollama's terms: a GGUF file, relative to the Modelfile, or the name of a model.
        dtype: of the factors.

    Raises:
        FileError: llama.cpp or Ollama cannot run this adapter, with every reason; or the folder cannot be written.
    """
    problems = not_a(Adapter, "an Adapter", adapter=adapter)
    if not isinstance(base_gguf, str) or not base_gguf.strip() or any(not c.isprintable() for c in base_gguf):
        what = f"is {show(base_gguf)}; a Modelfile takes a file or the name of a model there"
        problems.append(Diagnostic("base_gguf", what))
    if isinstance(adapter, Adapter) and rope_overrides(adapter):
        problems.append(Diagnostic("context", "it needs RoPE scaling, which a Modelfile cannot say", MERGE))
    if problems:
        where = show(checked_path(folder, "cannot export an adapter:"), most=400)
        raise FileError(f"cannot export an adapter to {where} for Ollama", problems)
    gguf.export_gguf(adapter, folder, model=model, dtype=dtype, texts={NAME: modelfile(tokenizer, base_gguf)})


def modelfile(tokenizer: Any, base_gguf: str) -> str:
    """The text of the Modelfile."""
    lines = ["# ollama create NAME -f Modelfile"]
    if base_gguf == BASE:
        lines.append(f"# {Path(BASE)}: of the base, by llama.cpp's convert_hf_to_gguf.py BASE --outfile {Path(BASE)}")
    lines += [f"FROM {base_gguf}", f"ADAPTER ./{gguf.NAME}"]
    found, why = chat_format(tokenizer) if tokenizer is not None else (None, "no tokenizer was given")
    if found is None:
        return "\n".join([*lines, f"# no TEMPLATE: {why}; Ollama takes the one of the base's GGUF, if it has one", ""])
    lines.append(f'TEMPLATE """{found.go()}"""')
    stop = found.around["assistant"][1].strip()
    if stop and stop.isprintable() and '"' not in stop:
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join([*lines, ""])
