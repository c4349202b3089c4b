"""The outcomes of a job that has no result: it has stopped, or failed."""

from __future__ import annotations

from dataclasses import dataclass


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A run has stopped before its end, and goes on from its checkpoint when the comparison does.

    Args:
        why: in words.
        signal: the number of the signal that stopped it; 0 if it was the budget.
    """

    def __init__(self, why: str, signal: int = 0) -> None:
        super().__init__(why, signal)
        self.why, self.signal = why, signal


@dataclass(frozen=True)
class Failure:
    """A run has failed, for another reason than its rate.

    Args:
        arm: name of its arm.
        why: the error.
    """

    arm: str
    why: str
