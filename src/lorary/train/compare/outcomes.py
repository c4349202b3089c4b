"""The outcomes of a job that has no result: it has stopped, or failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lorary.errors import LoraryError
from lorary.model.out_of_memory import allocator_message, is_out_of_memory

T = TypeVar("T")


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


def attempted(arm: str, what: object, make: Callable[[], T]) -> T | Failure:
    """The result of what an arm needs, or why there is none: one arm that fails does not end the others.

    Args:
        arm: its name.
        what: is made, in words.
        make: makes it.
    """
    try:
        return make()
    except LoraryError as error:
        return Failure(arm, f"{what}: {error}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Failure(arm, f"{what}: out of memory: {allocator_message(error)}")
