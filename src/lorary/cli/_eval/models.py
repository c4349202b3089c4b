"""The models of `lorary eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.adapters.resolve import adapter_at, find_model, read_adapter
from lorary.cli._eval.data import precision_of_first_run
from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.layers.rope import max_context
from lorary.model.loading.from_pretrained import load_config, load_tokenizer
from lorary.model.loading.source import ModelSection


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate.

    Args:
        name: from the command line.
        folder: of its adapter, if any.
        section: the base.
        tokenizer: of the base.
        context: tokens of text that it reads; None if unknown.
    """

    name: str
    folder: Path | None
    section: ModelSection
    tokenizer: Any
    context: int | None


def find_models(names: Sequence[str], base: str | None, dtype: str | None) -> list[EvalModel]:
    """The models of the command line.

    Raises:
        FileError: every one that cannot be found.
    """
    found: list[EvalModel] = []
    problems: list[Diagnostic] = []
    precision = precision_of_first_run(names) | ({"dtype": dtype} if dtype is not None else {})
    for name in dict.fromkeys(names):
        try:
            folder, section = find_model(name, base if adapter_at(name) else None)
            section = section.model_copy(update=precision)
            found.append(EvalModel(name, folder, section, load_tokenizer(section), _context(section, folder)))
        except LoraryError as error:
            problems += error.problems or [Diagnostic(name, error.headline)]
    if problems:
        raise FileError("cannot evaluate:", problems)
    return found


def _context(section: ModelSection, folder: Path | None) -> int | None:
    """The tokens of text that a model reads, with what its adapter adds to them and takes of them; None if unknown."""
    known = max_context(load_config(section).get_text_config())
    context = read_adapter(folder, section.id).method.context if folder else None
    if known is None or context is None:
        return known
    return max(known, context.length or 0) - context.taken
