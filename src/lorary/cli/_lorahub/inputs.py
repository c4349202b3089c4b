"""The model, the adapters and the examples of `lorary lorahub`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorary.adapters import load_adapter
from lorary.adapters.adapter import Adapter
from lorary.adapters.resolve import base_class, find_adapter, find_base, load_base
from lorary.errors import ConfigError, DataError, Diagnostic, FileError
from lorary.layers.rope import max_context
from lorary.model.loading.from_pretrained import load_config, load_tokenizer
from lorary.train.config.data_section import DataSection
from lorary.train.data.load import load
from lorary.train.data.tokenize import tokenize

_LONGEST = 1024  # tokens of an example, unless --max-length says otherwise
MOST = 1_000  # examples: each candidate reads all of them


@dataclass(frozen=True)
class Inputs:
    """Everything that a search needs.

    Args:
        model: the base, on the GPU if there is one.
        adapters: by their names on the command line.
        rows: the examples in tokens.
        notes: about the data.
    """

    model: Any
    adapters: Mapping[str, Adapter]
    rows: Sequence[Mapping[str, list[int]]]
    notes: tuple[str, ...]


def read_inputs(
    names: Sequence[str], examples: str, base: str | None, row_format: str, max_length: int | None, limit: int | None
) -> Inputs:
    """The adapters, their base, and the examples in its tokens.

    Raises:
        LoraryError: an adapter, the base or the examples cannot be read, or the base is not a language model.
    """
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        problems = [Diagnostic(name, "is named more than once", "name every adapter once") for name in repeated]
        raise ConfigError("cannot search for weights:", problems)
    folders = {name: find_adapter(name, "mix") for name in names}
    adapters = {_public(name): load_adapter(folder) for name, folder in folders.items()}
    first, folder = next(iter(adapters.values())), next(iter(folders.values()))
    section = find_base(folder, base)
    if base_class(section, folder, first) is not None:
        what = f"was trained on a {first.base.architecture}, and the examples of a file are for language models"
        raise FileError("cannot search for weights:", [Diagnostic(names[0], what, "use lorary.lorahub in Python")])
    tokenizer, config = load_tokenizer(section), load_config(section).get_text_config()
    length = max_length or min(_LONGEST, max_context(config) or _LONGEST)
    rows, notes = _rows(examples, tokenizer, row_format, length, limit)
    alike = all(adapter.method.storage == first.method.storage for adapter in adapters.values())
    model: Any = load_base(section, folder, first, quantized=alike)
    return Inputs(model.to("cuda") if torch.cuda.is_available() else model, adapters, rows, notes)


def _public(name: str) -> str:
    """The name of an adapter for the record: a path within this folder or a Hub id as it is, of others the end."""
    inside = not Path(name).is_absolute() and not re.match(r"~|\.\.", name)
    return name if inside else Path(name).name


def _rows(
    examples: str, tokenizer: Any, row_format: str, length: int, limit: int | None
) -> tuple[Sequence[Mapping[str, list[int]]], tuple[str, ...]]:
    """The examples in tokens, and notes.

    Raises:
        DataError: they cannot be read, are too long, or are more than a search should read forty times.
    """
    options: dict[str, Any] = {"train": (examples,), "format": row_format, "max_length": length}
    section = DataSection(**options)
    data = load(section)
    found = data.train[:limit]
    if len(found) > MOST:
        what = f"has {len(found):,} rows, and every candidate reads all of them"
        raise DataError("cannot search on these examples:", [Diagnostic(examples, what, "pass --limit, such as 20")])
    tokens = tokenize(found, tokenizer, section)
    return tokens.rows, (*data.notes, *tokens.notes)
