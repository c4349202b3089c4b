"""What is asked of a language model, whoever has it: how likely tokens are, and how a text goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Scores(Protocol):
    """A model, asked how likely tokens are."""

    def __call__(self, ids: Tensor, start: int) -> Tensor:
        """Log-probabilities in nats [rows, tokens - start] of the tokens from `start` (1 or more) on.

        Args:
            ids: [rows, tokens], on the CPU; each token is judged by all that stand before it in its row.
            start: the first position that is judged.
        """
        ...


Continued = Callable[[Tensor, int], str]
"""A model, asked to go on: token ids [tokens] and how many tokens more to the text of those, always the likeliest."""
