"""The options of `lorary inspect context`, checked before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lorary.adapters.resolve import adapter_at, adapter_folder, find_model
from lorary.analysis.long_context import default_lengths, stretches
from lorary.cli._out_folder import folder_problems
from lorary.errors import ConfigError, DataError, Diagnostic, FileError, LoraryError
from lorary.layers.rope import max_context, rope_parameters
from lorary.model.loading.from_pretrained import load_config, load_tokenizer
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.model.loading.source import ModelSection
from lorary.train.config.data_section import DataSection
from lorary.train.data.load import load_validation
from lorary.train.data.tokenize import token_ids, tokenize

HTML, JSON, SVG = "context.html", "context.json", "context.svg"
_UNCUT = 10_000_000  # tokens of one document
_SHORTEST = 2
_DIGITS = 9  # of a length; no text is longer


@dataclass(frozen=True)
class ModelUnderTest:
    """One of the models to measure.

    Args:
        name: from the command line.
        folder: of its adapter, if any.
        section: the base model.
        config: of the language model.
        tokenizer: of the base model.
    """

    name: str
    folder: Path | None
    section: ModelSection
    config: Any
    tokenizer: Any

    @property
    def max_context(self) -> int | None:
        """The longest context that its configuration states; an adapter may extend it."""
        return max_context(self.config)

    @property
    def limit(self) -> int | None:
        """The longest readable text of a model with learned position embeddings; None for others."""
        return self.max_context if rope_parameters(self.config) is None else None


@dataclass(frozen=True)
class Plan:
    """The measurements to make.

    Args:
        models: the models.
        texts: for each model, the text in its tokens: [stretches, longest].
        lengths: ascending.
        passkeys: trials at each length and depth.
        data: the source of the text.
        notes: remarks for the user.
    """

    models: tuple[ModelUnderTest, ...]
    texts: tuple[Tensor, ...] = field(repr=False)
    lengths: tuple[int, ...]
    passkeys: int
    data: str
    notes: tuple[str, ...] = ()


def make_plan(
    names: Sequence[str], base: str | None, lengths: str | None, data: str, tokens: int, passkeys: int, out: Path | None
) -> Plan:
    """The plan for the options of the command line.

    Raises:
        ConfigError: every invalid option, and every model that cannot be found.
        FileError: only models cannot be found.
        DataError: the text cannot be read, or there is too little of it.
    """
    with without_warnings():
        tested, unknown = _models(names, base)
        wanted, problems = _lengths(lengths, tested)
        problems += folder_problems(out, (HTML, JSON, SVG))
        if problems or unknown:
            kind = ConfigError if problems else FileError
            raise kind("cannot measure the use of context:", [*problems, *unknown])
        streams = _streams(data, tested)
    fits = tuple(length for length in wanted if length <= min(map(len, streams)))
    notes = []
    if len(fits) < len(wanted):
        left_out = ", ".join(f"{length:,}" for length in wanted[len(fits) :])
        what = f"has {min(map(len, streams)):,} tokens: too few for a length of {left_out}"
        if not fits:
            fix = f"name another text with --data, or shorter --lengths (at least {_SHORTEST})"
            raise DataError("not enough text:", [Diagnostic(data, what, fix)])
        notes.append(f"{data} {what}, which is left out")
    if not all(torch.equal(streams[0], stream) for stream in streams[1:]):
        notes.append("these models tokenize differently: their perplexities per token cannot be compared")
    texts = tuple(stretches(stream, fits[-1], tokens) for stream in streams)
    return Plan(tested, texts, fits, passkeys, data, tuple(notes))


def _models(names: Sequence[str], base: str | None) -> tuple[tuple[ModelUnderTest, ...], list[Diagnostic]]:
    """The models, and the reasons why others are not available."""
    found: list[ModelUnderTest] = []
    problems: list[Diagnostic] = []
    for name in dict.fromkeys(names):
        try:
            folder, section = find_model(name, base if adapter_at(name) else None)
            config, tokenizer = load_config(section).get_text_config(), load_tokenizer(section)
            found.append(ModelUnderTest(name, folder, section, config, tokenizer))
        except LoraryError as error:
            problems += error.problems or [Diagnostic(name, error.headline)]
    if base is not None and not any(adapter_folder(Path(name)) for name in names):
        problems.append(Diagnostic(f"--base {base}", "none of the models is an adapter", "leave it out"))
    return tuple(found), problems


def _lengths(given: str | None, models: Sequence[ModelUnderTest]) -> tuple[tuple[int, ...], list[Diagnostic]]:
    """The requested lengths, ascending, and the reasons against others."""
    limits = {model.name: model.limit for model in models if model.limit}
    if given is None:
        lengths = default_lengths([model.max_context for model in models])
        limit = min(limits.values(), default=math.inf)
        return tuple(x for x in lengths if x <= limit) or (int(limit),), []
    texts = [text.strip() for text in given.split(",") if text.strip()] or [given]
    problems = [
        Diagnostic(f"--lengths {text}", f"is not a number of tokens, {_SHORTEST} or more", "such as 256,512,1024")
        for text in texts
        if not _is_length(text)
    ]
    lengths = tuple(sorted({int(text) for text in texts if _is_length(text)}))
    for name, limit in limits.items():
        beyond = [f"{length:,}" for length in lengths if length > limit]
        if beyond:
            what = f"{name} has learned embeddings of {limit:,} positions only"
            problems.append(Diagnostic(f"--lengths {', '.join(beyond)}", what, f"use at most {limit}"))
    return lengths, problems


def _is_length(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS and int(text) >= _SHORTEST


def _streams(data: str, models: Sequence[ModelUnderTest]) -> list[Tensor]:
    """The concatenated held-out documents, in the tokens of each model.

    Raises:
        DataError: the data cannot be read, or a tokenizer has more tokens than its model.
    """
    options: dict[str, Any] = {"max_length": _UNCUT, "overlong": "truncate", "loss": "all"}
    section = DataSection(train=(data,), validation=(data,), format="auto", **options)
    examples = load_validation(section)
    streams: list[Tensor] = []
    problems: list[Diagnostic] = []
    for model in models:
        rows = tokenize(examples, model.tokenizer, section).rows
        ids = [i for row in rows for i in token_ids(row)]
        streams.append(torch.tensor(ids))
        if max(ids, default=0) >= model.config.vocab_size:
            what = f"its tokenizer has token {max(ids):,}, but the model has only {model.config.vocab_size:,}"
            problems.append(Diagnostic(model.name, what, "the tokenizer does not belong to the model"))
    if problems:
        raise DataError(f"cannot read {data}:", problems)
    return streams


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without Transformers' warnings: texts longer than a model's context are intended here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with quiet_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(before)
