"""The rows on which commands compare two models: held-out rows of the run, requested ones, or built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorary.errors import DataError, Diagnostic, LoraryError
from lorary.layers.rope import max_context
from lorary.train.config.config import Config
from lorary.train.config.data_section import DataSection
from lorary.train.config.load import load as load_config
from lorary.train.data.load import load, load_validation
from lorary.train.data.row_formats import Example
from lorary.train.data.tokenize import token_ids, tokenize
from lorary.train.runner.folder import ADAPTER, CONFIG

WINDOW = 128  # tokens of a row: each has one logit per vocabulary entry
TEXTS = "builtin:topics"


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, and their source.

    Args:
        ids: [tokens] each.
        source: in words.
        notes: failed attempts.
    """

    ids: tuple[Tensor, ...]
    source: str
    notes: tuple[str, ...] = ()


def comparison_rows(path: Path, tokenizer: Any, config: Any, most: int, data: str | None = None) -> Rows:
    """At most `most` rows, evenly spread over the data, cut to 128 tokens.

    Args:
        path: an adapter or run folder. The held-out rows of its run are preferred.
        tokenizer: of the model, or None.
        config: the model's own configuration.
        most: the number of rows.
        data: other rows, as `data` in a configuration; the validation part.

    Raises:
        LoraryError: `data` cannot be read.
    """
    text = config.get_text_config()
    room = min(WINDOW, max_context(text) or WINDOW)
    if data is not None:
        if tokenizer is None:
            raise DataError(f"cannot read {data}:", [Diagnostic("", "the base has no tokenizer", "leave --data out")])
        section = _section(data)
        return Rows(_tokens(load_validation(section), tokenizer, section, most, room), f"rows of {data}")
    notes: list[str] = []
    run = _run_of(path)
    if tokenizer is not None and run is not None:
        try:
            if rows := _held_out(run, tokenizer, most, room, text.vocab_size):
                return Rows(rows, "rows that its run held out")
        except (LoraryError, OSError) as error:
            notes.append(f"the run's own rows cannot be read: {str(error).splitlines()[0]}")
    if tokenizer is not None:
        section = _section(TEXTS)
        rows = _tokens(load_validation(section), tokenizer, section, most, room)
        if _in_vocabulary(rows, text.vocab_size):
            return Rows(rows, f"rows of {TEXTS}", tuple(notes))
    return Rows(random_rows(text.vocab_size, most, room), "rows of random tokens", tuple(notes))


def random_rows(vocabulary: int, count: int, length: int) -> tuple[Tensor, ...]:
    """Rows of uniformly random tokens, the same at every call."""
    return tuple(torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)))


def _run_of(path: Path) -> Path | None:
    folders = [path, path.parent] if path.name == ADAPTER else [path]
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)


def _held_out(run: Path, tokenizer: Any, most: int, room: int, vocabulary: int) -> tuple[Tensor, ...]:
    """The held-out rows of a run; none if it has none, or another tokenizer."""
    config = run_config(run)
    if config is None:
        return ()
    section = config.data
    if section.validation is not None:
        examples: Sequence[Example] = load_validation(section)
    elif section.validation_split:
        examples = load(section, config.task, config.training.seed).validation
    else:
        return ()
    rows = _tokens(examples, tokenizer, section, most, room)
    return rows if _in_vocabulary(rows, vocabulary) else ()


def run_config(path: Path) -> Config | None:
    """The configuration of the run in this folder, or of this adapter; None if there is none.

    Raises:
        LoraryError: the configuration cannot be read.
    """
    run = _run_of(path)
    return None if run is None else load_config(run / CONFIG)


def _section(source: str) -> DataSection:
    return DataSection(train=(source,), validation=(source,), format="auto")


def _tokens(
    examples: Sequence[Example], tokenizer: Any, section: DataSection, most: int, room: int
) -> tuple[Tensor, ...]:
    at = torch.linspace(0, len(examples) - 1, min(most, len(examples))).long().tolist()
    options: dict[str, Any] = {"max_length": max(room, 8), "overlong": "truncate", "loss": "all"}
    tokenized = tokenize([examples[i] for i in at], tokenizer, section.model_copy(update=options))
    return tuple(torch.tensor(ids[:room]) for row in tokenized.rows if (ids := token_ids(row)))


def _in_vocabulary(rows: Sequence[Tensor], vocabulary: int) -> bool:
    return bool(rows) and all(int(ids.max()) < vocabulary for ids in rows)
