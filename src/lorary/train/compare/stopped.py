"""The end of a comparison before its last run."""

from __future__ import annotations


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run has stopped before its end, and goes on from its checkpoint when the comparison does.

    Args:
        why: in words.
        signal: the number of the signal that stopped it; 0 if it was the budget.
    """

    def __init__(self, why: str, signal: int = 0) -> None:
        super().__init__(why, signal)
        self.why, self.signal = why, signal
