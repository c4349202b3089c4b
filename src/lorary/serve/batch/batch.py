"""The batch of a forward pass: segments of rows with the same adapters.

The rows of a batch are sorted by adapter. A layer gets its rows flattened, [rows, in], and finds its segments by their
number: a language model calls most layers with one row for each token, and its head, under continuous batching, with
one row for each request that gets a token. Where the two numbers are equal, every request has one token and the
segments are the same, so that the number decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorary.serve.forms.serving_form import ServingForm

Weighted = tuple[tuple[ServingForm, float], ...]  # adapters with weights; empty for the base


class Segment(NamedTuple):
    """Consecutive rows with the same adapters.

    Args:
        start, stop: the rows.
        adapters: the adapters, with the weights of the request: their forms, with tensors on the base's device.
    """

    start: int
    stop: int
    adapters: Weighted


class Piece(NamedTuple):
    """Consecutive rows, and an adapter with its weight. The pieces of a weighted sum have the same rows."""

    start: int
    stop: int
    form: ServingForm
    weight: float


@dataclass(frozen=True)
class Batch:
    """The segments of a forward pass.

    Args:
        tables: number of rows -> the segments of that many rows, without those of the base alone, in order.
    """

    tables: Mapping[int, tuple[Segment, ...]]

    @property
    def idle(self) -> bool:
        """Whether no row has an adapter."""
        return not any(self.tables.values())

    @staticmethod
    def of(requests: Sequence[tuple[Weighted, int, int]]) -> Batch:
        """The batch of requests in their order.

        Args:
            requests: (adapters, rows in most layers, rows at the head) of each.
        """
        tables = {}
        for at_the_head in (True, False):
            start, segments = 0, list[Segment]()
            for adapters, rows, head_rows in requests:
                stop = start + (head_rows if at_the_head else rows)
                last = segments[-1] if segments else None
                if last is not None and last.stop == start and last.adapters == adapters:
                    segments[-1] = Segment(last.start, stop, adapters)
                elif adapters and stop > start:
                    segments.append(Segment(start, stop, adapters))
                start = stop
            tables[start] = tuple(segments)
        return Batch(tables)
