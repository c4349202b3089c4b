"""What `lorary inspect context` is asked for, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from lorary.adapters.resolve import adapter_folder, model_of
from lorary.analysis.long_context import default_lengths, stretches
from lorary.errors import ConfigError, DataError, Diagnostic, FileError, LoraryError
from lorary.layers.rope import max_context, rotation
from lorary.model.loading.from_pretrained import load_config, load_tokenizer, quiet
from lorary.model.loading.source import ModelSection
from lorary.train.config.config import DataSection
from lorary.train.data.load import validation
from lorary.train.data.tokenize import tokenize

HTML, JSON, SVG = "context.html", "context.json", "context.svg"
_UNCUT = 10_000_000  # tokens of one document
_SHORTEST = 2
_DIGITS = 9  # of a length: more would be no text that anybody has


@dataclass(frozen=True)
class Request:
    """The command line as it was given."""

    models: tuple[str, ...]
    base: str | None
    lengths: str | None
    data: str
    tokens: int
    passkeys: int
    out: Path | None


@dataclass(frozen=True)
class ModelUnderTest:
    """A model that can be loaded.

    Args:
        name: as it was given.
        folder: of the adapter on it, if there is one.
        section: which model.
        config: of its language part.
        tokenizer: its own.
    """

    name: str
    folder: Path | None
    section: ModelSection
    config: Any
    tokenizer: Any

    @property
    def known(self) -> int | None:
        """How many tokens it reads, where it says so; an adapter on it may know more."""
        return max_context(self.config)

    @property
    def most(self) -> int | None:
        """The longest text that it can read at all: positions that are learnt one by one end with their table."""
        return self.known if rotation(self.config) is None else None


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Args:
        subjects: the models.
        texts: of each, the text [stretches, longest] in its tokens.
        lengths: ascending.
        passkeys: at each length and depth.
        data: where the text is from.
        notes: what is worth knowing.
    """

    subjects: tuple[ModelUnderTest, ...]
    texts: tuple[Tensor, ...] = field(repr=False)
    lengths: tuple[int, ...]
    passkeys: int
    data: str
    notes: tuple[str, ...] = ()


def checked(asked: Request) -> Plan:
    """What a command line comes to, before any weight is read.

    Raises:
        ConfigError: every option that cannot be, and every model that cannot be found.
        FileError: the same, where models alone are to blame.
        DataError: the text cannot be read, or there is too little of it.
    """
    with quietly():
        subjects, unknown = _subjects(asked)
        lengths, problems = _lengths(asked.lengths, subjects)
        problems += _folder(asked.out)
        if problems or unknown:
            kind = ConfigError if problems else FileError
            raise kind("the use of context cannot be measured:", [*problems, *unknown])
        streams = _streams(asked.data, subjects)
    fits = tuple(length for length in lengths if length <= min(map(len, streams)))
    notes = []
    if len(fits) < len(lengths):
        left = ", ".join(f"{length:,}" for length in lengths[len(fits) :])
        what = f"has {min(map(len, streams)):,} tokens: too few for a length of {left}"
        if not fits:
            fix = f"name another text with --data, or shorter --lengths, from {_SHORTEST} on"
            raise DataError("not enough text:", [Diagnostic(asked.data, what, fix)])
        notes.append(f"{asked.data} {what}, which is left out")
    if not all(torch.equal(streams[0], stream) for stream in streams[1:]):
        notes.append("these models divide text into other tokens: their perplexities per token cannot be compared")
    texts = tuple(stretches(stream, fits[-1], asked.tokens) for stream in streams)
    return Plan(subjects, texts, fits, asked.passkeys, asked.data, tuple(notes))


def _subjects(asked: Request) -> tuple[tuple[ModelUnderTest, ...], list[Diagnostic]]:
    """The models, and why others cannot be had."""
    found: list[ModelUnderTest] = []
    problems: list[Diagnostic] = []
    for name in dict.fromkeys(asked.models):
        try:
            folder, section = model_of(name, asked.base if adapter_folder(Path(name)) else None)
            found.append(
                ModelUnderTest(name, folder, section, load_config(section).get_text_config(), load_tokenizer(section))
            )
        except LoraryError as error:
            problems += error.problems or [Diagnostic(name, error.headline)]
    if asked.base is not None and not any(adapter_folder(Path(name)) for name in asked.models):
        problems.append(Diagnostic(f"--base {asked.base}", "no adapter is named that could go on it", "leave it out"))
    return tuple(found), problems


def _lengths(given: str | None, subjects: Sequence[ModelUnderTest]) -> tuple[tuple[int, ...], list[Diagnostic]]:
    """The lengths that are asked for, ascending, and why some cannot be."""
    limits = {subject.name: subject.most for subject in subjects if subject.most}
    if given is None:
        lengths = default_lengths([subject.known for subject in subjects])
        least = min(limits.values(), default=None)
        return tuple(x for x in lengths if least is None or x <= least) or (least or 0,), []
    words = [word.strip() for word in given.split(",") if word.strip()]
    problems = [
        Diagnostic(f"--lengths {word}", "is no whole number of tokens, 2 or more", "write it as in 256,512,1024")
        for word in words or [given]
        if not _is_length(word)
    ]
    lengths = tuple(sorted({int(word) for word in words if _is_length(word)}))
    for name, most in limits.items():
        beyond = [f"{length:,}" for length in lengths if length > most]
        if beyond:
            what = f"{name} has a learnt table of {most:,} positions and nothing beyond it"
            problems.append(Diagnostic(f"--lengths {', '.join(beyond)}", what, f"ask for at most {most}"))
    return lengths, problems


def _is_length(word: str) -> bool:
    return word.isdecimal() and len(word) <= _DIGITS and int(word) >= _SHORTEST


def _folder(out: Path | None) -> list[Diagnostic]:
    """Why nothing may be written there; what an earlier call wrote is replaced."""
    if out is None or not out.exists():
        return []
    if not out.is_dir():
        return [Diagnostic(f"--out {out}", "is a file", "name a folder")]
    strange = sorted(path.name for path in out.iterdir() if path.name not in (HTML, JSON, SVG))
    what = f"holds what this command did not write: {', '.join(strange[:5])}"
    return [Diagnostic(f"--out {out}", what, "name another folder")] if strange else []


def _streams(data: str, subjects: Sequence[ModelUnderTest]) -> list[Tensor]:
    """The held-out documents one after another, in the tokens of each model.

    Raises:
        DataError: they cannot be read, or a tokenizer has more tokens than its model.
    """
    words: dict[str, Any] = {"max_length": _UNCUT, "overlong": "truncate", "loss": "all"}
    section = DataSection(train=(data,), validation=(data,), format="auto", **words)
    examples = validation(section)
    streams: list[Tensor] = []
    problems: list[Diagnostic] = []
    for subject in subjects:
        rows = tokenize(examples, subject.tokenizer, section).rows
        ids = [i for row in rows for i in (row.get("input_ids") or row["prompt_ids"] + row["chosen_ids"])]
        streams.append(torch.tensor(ids))
        if max(ids, default=0) >= subject.config.vocab_size:
            what = f"its tokenizer says token {max(ids):,}, and the model has {subject.config.vocab_size:,}"
            problems.append(Diagnostic(subject.name, what, "the tokenizer beside the model is not its own"))
    if problems:
        raise DataError(f"cannot read {data}:", problems)
    return streams


@contextmanager
def quietly() -> Iterator[None]:
    """Without Transformers' warnings: texts longer than what a model knows are what is asked for here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        transformers_logging.set_verbosity(before)
