"""The figures of runs that learn one task; less is better."""

from __future__ import annotations

from collections.abc import Callable

from ledger import Record
from protocol import loss_at, steps_to
from tasks import HEADERS

Figures = tuple[list[float], list[float]]  # of the method's runs, and of the other's, pair by pair
Measure = Callable[[list[Record], list[Record], int], Figures]


def loss(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """Held-out loss after as many steps, nats."""
    return [loss_at(r, HEADERS, horizon) for r in method], [loss_at(r, HEADERS, horizon) for r in against]


def speed(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """Steps to the mean loss that the other one has after two thirds of the steps."""
    target = sum(loss_at(r, HEADERS, horizon * 2 / 3) for r in against) / len(against)
    ours, theirs = ([steps_to(r, HEADERS, target, horizon) for r in runs] for runs in (method, against))
    return ours, theirs
