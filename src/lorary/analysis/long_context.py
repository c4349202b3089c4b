"""How well a language model uses long context: perplexity by length, loss by position, retrieval of a passkey.

Models are accessed by two functions, the log-probabilities of tokens (`Scores`) and greedy continuations
(`Continuation`), so that the caller controls the memory of the logits.

Perplexity is measured as in LongLoRA (Chen et al. 2023, arXiv:2309.12307, tables 3 and 4), in windows of each length.
Differs from the paper: all lengths use the same text, since shorter windows are pieces of the longest ones, so that
differences between lengths are due to context alone. The first token of a window is not predicted: a length L predicts
all but 1/L of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lorary.analysis.passkey import Retrieval, Scores
from lorary.errors import DataError, Diagnostic
from lorary.files.strict_json import finite

BLOCKS = 16
_BATCH_TOKENS = 4096  # per call of a model: short windows are batched


@dataclass(frozen=True)
class Length:
    """The loss in windows of one length.

    Args:
        tokens: of each window.
        windows: their number.
        predicted: tokens predicted in all windows.
        nats: mean loss per predicted token.
    """

    tokens: int
    windows: int
    predicted: int
    nats: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite if that overflows."""
        return math.nan if math.isnan(self.nats) else math.exp(self.nats) if self.nats < 700 else math.inf


@dataclass(frozen=True)
class Block:
    """The loss in a range of positions, in windows of one length.

    Args:
        start: its first position, counted from 0 at a window's first token.
        stop: the first position after it.
        predicted: tokens predicted there in all windows.
        nats: mean loss per predicted token.
    """

    start: int
    stop: int
    predicted: int
    nats: float


@dataclass(frozen=True)
class Context:
    """The use of context by one model.

    Args:
        model: its name.
        max_context: the longest context by its configuration; None if not stated.
        lengths: perplexity by length, ascending.
        blocks: loss by position in windows of the longest length.
        passkeys: one per length and depth, in that order; may be empty.
    """

    model: str
    max_context: int | None
    lengths: tuple[Length, ...]
    blocks: tuple[Block, ...]
    passkeys: tuple[Retrieval, ...] = ()

    def all_depths(self, length: int) -> Retrieval | None:
        """The passkeys of one length, all depths together; None if there are none."""
        cells = [cell for cell in self.passkeys if cell.length == length]
        if not cells:
            return None
        trials = sum(cell.trials for cell in cells)
        nats, other = (math.fsum(getattr(c, name) * c.trials for c in cells) / trials for name in ("nats", "other"))
        return Retrieval(length, math.nan, trials, sum(cell.found for cell in cells), nats, other)

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON types; None for values that are not finite."""
        lengths = [vars(length) | {"perplexity": length.perplexity} for length in self.lengths]
        passkeys = [vars(cell) | {"gain": cell.gain} for cell in self.passkeys]
        return {
            "model": self.model,
            "known": self.max_context,
            "lengths": [finite(record) for record in lengths],
            "positions": [finite(vars(block)) for block in self.blocks],
            "passkeys": [finite(record) for record in passkeys],
        }


def stretches(stream: Tensor, longest: int, budget: int) -> Tensor:
    """The text for all lengths: evenly spread stretches of the longest one, without overlap.

    Args:
        stream: token ids [tokens] of the concatenated documents.
        longest: the longest length, in tokens.
        budget: tokens at most, but at least one stretch is taken.

    Returns:
        [stretches, longest].

    Raises:
        DataError: the stream is shorter than one stretch.

    >>> stretches(torch.arange(10), 3, 6).tolist()
    [[0, 1, 2], [7, 8, 9]]
    """
    if len(stream) < longest:
        what = f"has {len(stream):,} tokens, and the longest length is {longest:,}"
        raise DataError("not enough text:", [Diagnostic("data", what, "ask for shorter lengths")])
    count = min(max(budget // longest, 1), len(stream) // longest)
    starts = [i * (len(stream) - longest) // max(count - 1, 1) for i in range(count)]
    return torch.stack([stream[start : start + longest] for start in starts])


def losses(scores: Scores, text: Tensor, length: int) -> Tensor:
    """The loss of every predicted token in windows of one length.

    Args:
        scores: the model.
        text: [stretches, tokens], from `stretches`. Each is cut into windows; an incomplete last window is left out.
        length: tokens of a window, 2 or more.

    Returns:
        Nats [windows, length - 1], in fp64 on the CPU; column i is of the token at position i + 1.
    """
    windows = text[:, : text.shape[1] // length * length].reshape(-1, length)
    parts = windows.split(max(_BATCH_TOKENS // length, 1))
    return torch.cat([-scores(part, 1).double().cpu() for part in parts])


def by_length(nats: Tensor) -> Length:
    """The mean of the losses [windows, length - 1] from `losses`."""
    windows, predicted = nats.shape
    return Length(predicted + 1, windows, nats.numel(), float(nats.mean()))


def by_position(nats: Tensor, blocks: int = BLOCKS) -> tuple[Block, ...]:
    """The losses [windows, length - 1] from `losses`, averaged in equal blocks of positions.

    Args:
        nats: the losses.
        blocks: their number; fewer if a window is too short.

    Returns:
        In order; they cover every predicted token once. The first has one less, since position 0 is not predicted.

    >>> [(b.start, b.stop, b.predicted, b.nats) for b in by_position(torch.tensor([[1.0, 2.0, 4.0]]), 2)]
    [(0, 2, 1, 1.0), (2, 4, 2, 3.0)]
    """
    length = nats.shape[1] + 1
    blocks = min(blocks, length // 2)
    edges = [i * length // blocks for i in range(blocks + 1)]
    parts = [(start, stop, nats[:, max(start - 1, 0) : stop - 1]) for start, stop in pairwise(edges)]
    return tuple(Block(start, stop, part.numel(), float(part.mean())) for start, stop, part in parts)


def default_lengths(max_contexts: Sequence[int | None]) -> tuple[int, ...]:
    """Powers of two from a quarter to four times the longest context of the models; 128 to 2,048 if none states it.

    >>> default_lengths([256, None])
    (64, 128, 256, 512, 1024)
    """
    most = max((k for k in max_contexts if k), default=512)
    powers = [2**i for i in range(1, (4 * most).bit_length()) if 2**i >= most / 4]
    return tuple(powers)
