"""The interface of a runner, which computes forward passes for the sequences that it holds, in one thread."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorary.serve.batch.batch import Weighted
from lorary.serve.pool.arena import Arena


@dataclass(frozen=True)
class Shape:
    """The sizes of a runner.

    Args:
        budget: bytes of adapters, keys and values.
        page: tokens whose keys and values lie together.
        tokens: of a forward pass at most; longer prompts are computed in parts.
        rows: sequences at a time.
    """

    budget: int
    page: int = 32
    tokens: int = 512
    rows: int = 64


@dataclass
class Row:
    """A sequence in a runner.

    Args:
        id: unique.
        prompt: its first tokens.
        adapters: its adapters, with tensors beside the base.
        cached: tokens of the prompt whose keys and values were there already; the runner sets it.
    """

    id: str
    prompt: tuple[int, ...]
    adapters: Weighted = ()
    cached: int = 0

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """Equal for rows with the same adapters and weights: batches are sorted by it."""
        return tuple((form.uid, weight) for form, weight in self.adapters)

    @property
    def salt(self) -> int | None:
        """The salt of its prefix cache, 64 bits: keys and values depend on the adapters. None for the base."""
        if not self.adapters:
            return None
        return int.from_bytes(hashlib.blake2b(repr(self.key).encode(), digest_size=8).digest(), "little")


# Takes the rows that get a token and their logits [rows, vocabulary] in fp32; returns the tokens.
Choose = Callable[[Sequence[Row], Tensor], Sequence[int]]


class Runner(Protocol):
    """Computes the next tokens of sequences.

    Attributes:
        model: the base.
        kind: how it computes, for logs.
        most_tokens: of a sequence, prompt and continuation together; None for no limit.
        current: the ids of the sequences in the forward pass that is computed, or was computed last.
        arena: the memory that keys and values share with adapters.
        kept: sectors of it that adapters never take, so that the longest sequence always finds room.
        make_room: called when keys and values need sectors: has adapters give way, and says whether they did.
    """

    model: Any
    kind: str
    most_tokens: int | None
    current: list[str]
    arena: Arena
    kept: int
    make_room: Callable[[int], bool]

    def add(self, row: Row) -> None:
        """Hold a sequence from the next forward pass on."""
        ...

    def remove(self, id: str) -> None:
        """Forget a sequence; unknown ids are ignored."""
        ...

    def step(self, choose: Choose, only: str | None = None) -> None:
        """Compute one forward pass, of one sequence alone if it is named, and append the tokens that `choose` returns.

        Raises:
            Exception: whatever the forward pass or `choose` raised; the sequences of `current` are to be removed or
                restarted.
        """
        ...

    def restart(self, id: str) -> None:
        """Compute a sequence from its first token again, with those that it has got."""
        ...

    def used_bytes(self) -> int:
        """Bytes of the arena in use, by keys and values that are needed and by adapters. From any thread."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...
