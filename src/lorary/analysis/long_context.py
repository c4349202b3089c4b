"""How well a language model uses long context: perplexity by length, loss by position, retrieval of a passkey.

Nothing here knows what a model is: it is asked for the log-probabilities of tokens (`Scores`) and for greedy
continuations (`Continued`), so that whoever has the model decides how its logits are kept small.

Perplexity is measured as LongLoRA does (Chen et al. 2023, arXiv:2309.12307, tables 3 and 4), in windows of each length,
but of one text for all of them: a shorter length cuts the windows of the longest one into pieces. What a model gains
from context is then the difference between two lengths, and none of it is a difference between texts. A window's
first token is not predicted, so that a length L predicts all but 1/L of the text.
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

BLOCKS = 16
_TOGETHER = 4096  # tokens per call of a model: short windows are read several at a time


@dataclass(frozen=True)
class Length:
    """What windows of one length came to.

    Args:
        tokens: of each window.
        windows: how many.
        predicted: tokens that were predicted, in all of them.
        nats: mean loss per predicted token.
    """

    tokens: int
    windows: int
    predicted: int
    nats: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where that overflows."""
        return math.exp(self.nats) if self.nats < 700 else math.inf if not math.isnan(self.nats) else math.nan


@dataclass(frozen=True)
class Block:
    """What a range of positions came to, in windows of one length.

    Args:
        start: its first position, counted from 0 at a window's first token.
        stop: the first position behind it.
        predicted: tokens that were predicted there, in all windows.
        nats: mean loss per predicted token.
    """

    start: int
    stop: int
    predicted: int
    nats: float


@dataclass(frozen=True)
class Context:
    """How well one model uses context.

    Args:
        model: its name.
        known: how many positions it knows; None where its configuration does not say.
        lengths: perplexity by length, ascending.
        blocks: loss by position in windows of the longest length.
        passkeys: one for each length and depth, in that order; none where none were hidden.
    """

    model: str
    known: int | None
    lengths: tuple[Length, ...]
    blocks: tuple[Block, ...]
    passkeys: tuple[Retrieval, ...] = ()

    def hidden(self, length: int) -> Retrieval | None:
        """The passkeys of one length at all depths together; None where none were hidden."""
        cells = [cell for cell in self.passkeys if cell.length == length]
        if not cells:
            return None
        trials = sum(cell.trials for cell in cells)
        nats, other = (math.fsum(getattr(c, name) * c.trials for c in cells) / trials for name in ("nats", "other"))
        return Retrieval(length, math.nan, trials, sum(cell.found for cell in cells), nats, other)

    def to_dict(self) -> dict[str, Any]:
        """The whole record in plain values, for a file: what is not finite there is None."""
        lengths = [vars(length) | {"perplexity": length.perplexity} for length in self.lengths]
        passkeys = [vars(cell) | {"gain": cell.gain} for cell in self.passkeys]
        return {
            "model": self.model,
            "known": self.known,
            "lengths": [_finite(record) for record in lengths],
            "positions": [_finite(vars(block)) for block in self.blocks],
            "passkeys": [_finite(record) for record in passkeys],
        }


def stretches(stream: Tensor, longest: int, budget: int) -> Tensor:
    """The text on which every length is measured: stretches of the longest one, evenly spread, without overlap.

    Args:
        stream: token ids [tokens], the documents one after another.
        longest: the longest length, in tokens.
        budget: most tokens; one stretch is taken even where it has more.

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
    """The loss of every predicted token, where the model sees windows of one length.

    Args:
        scores: the model.
        text: [stretches, tokens], as `stretches` gives it. Each is cut into windows; a rest that is no whole window,
            where `length` does not divide the stretch, is left out.
        length: tokens of a window, 2 or more.

    Returns:
        Nats [windows, length - 1], in fp64 on the CPU; column i is of the token at position i + 1.
    """
    windows = text[:, : text.shape[1] // length * length].reshape(-1, length)
    parts = windows.split(max(_TOGETHER // length, 1))
    return torch.cat([-scores(part, 1).double().cpu() for part in parts])


def by_length(lost: Tensor) -> Length:
    """Losses [windows, length - 1], as `losses` gives them, in one number per length."""
    windows, predicted = lost.shape
    return Length(predicted + 1, windows, lost.numel(), float(lost.mean()))


def by_position(lost: Tensor, blocks: int = BLOCKS) -> tuple[Block, ...]:
    """Losses [windows, length - 1], as `losses` gives them, in equal blocks of positions.

    Args:
        lost: the losses.
        blocks: how many; fewer where a window has fewer predicted tokens.

    Returns:
        In order; they cover every predicted token once. The first has one less, since position 0 is not predicted.

    >>> [(b.start, b.stop, b.predicted, b.nats) for b in by_position(torch.tensor([[1.0, 2.0, 4.0]]), 2)]
    [(0, 2, 1, 1.0), (2, 4, 2, 3.0)]
    """
    length = lost.shape[1] + 1
    blocks = min(blocks, length // 2)
    edges = [i * length // blocks for i in range(blocks + 1)]
    found = []
    for start, stop in pairwise(edges):
        part = lost[:, max(start - 1, 0) : stop - 1]
        found.append(Block(start, stop, part.numel(), float(part.mean())))
    return tuple(found)


def default_lengths(known: Sequence[int | None]) -> tuple[int, ...]:
    """Powers of two from a quarter of what models know up to four times that; where none says it, 128 to 2,048.

    >>> default_lengths([256, None])
    (64, 128, 256, 512, 1024)
    """
    most = max((k for k in known if k), default=512)
    powers = [2**i for i in range(1, (4 * most).bit_length()) if 2**i >= most / 4]
    return tuple(powers)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
