"""Observations of a model: the log-probabilities of some tokens after some prefixes of a probe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorary.errors import ConfigError, Diagnostic

PROBES = (
    "The river rises in the mountains and flows through three countries before it",
    "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n",
    "Question: What is the capital of France?\nAnswer:",
    "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    '{"name": "Ada", "year": 1843, "tags": ["notes", "engine"],',
    "User: Please write a short poem about rain.\nAssistant: Softly",
    "Translate to German: The house is small. ->",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY",
)
MOST_TOKENS = 32  # of a probe
_BATCH = 16  # rows at a time


@dataclass(frozen=True)
class Observed:
    """Log-probabilities that a model gives to tokens.

    Args:
        ids: the tokens of the probe.
        at: for each number, the position in `ids` after which the token was asked for.
        tokens: for each number, the token.
        values: the log-probabilities, in nats.
    """

    ids: tuple[int, ...]
    at: tuple[int, ...]
    tokens: tuple[int, ...]
    values: tuple[float, ...]


class Engine(Protocol):
    """A program that computes with a base and with an adapter on it.

    Attributes:
        name: in the certificate.
        release: of its software, if it tells; empty otherwise.
    """

    name: str
    release: str

    def observe(self, ids: Sequence[int], *, adapted: bool) -> list[Observed]:
        """The log-probabilities after one probe.

        Raises:
            LoraryError: it cannot compute them.
        """
        ...

    def has_base(self) -> bool:
        """Whether the base can be observed without the adapter."""
        ...


def probe_ids(tokenizer: Any) -> list[list[int]]:
    """The tokens of the fixed probes, each of at least two."""
    rows = [list(tokenizer(text)["input_ids"])[:MOST_TOKENS] for text in PROBES]
    return [row for row in rows if len(row) > 1]


def digest(rows: Iterable[Sequence[int]]) -> str:
    """The SHA-256 of the probes' tokens."""
    return hashlib.sha256(" ".join(",".join(map(str, row)) for row in rows).encode()).hexdigest()


@torch.no_grad()
def log_probabilities(model: Any, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """For each row, the log-probabilities [its length, vocabulary] of the next token after each prefix, in fp32.

    Rows are padded at their ends, which a causal model does not see.
    """
    device = next(model.parameters()).device
    for start in range(0, len(rows), _BATCH):
        several = rows[start : start + _BATCH]
        length = max(map(len, several))
        ids = torch.tensor([[*row, *[row[0]] * (length - len(row))] for row in several], device=device)
        logits = model(input_ids=ids).logits.float()
        if logits.shape[:2] != ids.shape:
            what = f"gives {list(logits.shape)} for {list(ids.shape)} tokens, and no logits for each of them"
            raise ConfigError("cannot verify:", [Diagnostic("model", what, "give a causal language model")])
        for row, found in zip(several, logits, strict=True):
            yield torch.log_softmax(found[: len(row)], -1).cpu()


def observe(model: Any, ids: Sequence[int]) -> Observed:
    """The log-probabilities that a model gives to a probe's own tokens."""
    (found,) = log_probabilities(model, [ids])
    at, tokens = tuple(range(len(ids) - 1)), tuple(ids[1:])
    return Observed(tuple(ids), at, tokens, tuple(found[list(at), list(tokens)].tolist()))


def our_values(model: Any, several: Sequence[Observed]) -> list[float]:
    """A model's own values of what was observed."""
    rows = list(dict.fromkeys(one.ids for one in several))
    found = dict(zip(rows, log_probabilities(model, rows), strict=True))
    return [value for one in several for value in found[one.ids][list(one.at), list(one.tokens)].tolist()]


def their_values(several: Sequence[Observed]) -> list[float]:
    """The values that were observed, in the order of `our_values`."""
    return [value for one in several for value in one.values]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The root mean square of the differences, in nats; 0 for no numbers."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) if a else 0.0
