"""Forward passes with their draws, and what follows when one raises: only a guilty request fails."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorary.serve.engine.in_flight import InFlight
from lorary.serve.engine.runner import Row, Runner
from lorary.serve.engine.sampler import Drawn, draw

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a forward pass.

    Args:
        drawn: the next tokens.
        failed: id -> why the request cannot go on.
    """

    drawn: Sequence[tuple[InFlight, Drawn]] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class ForwardPasses:
    """The forward passes of an engine. In its thread only.

    The requests of a forward pass that raises are computed again one by one, from their first token, so that the
    guilty one fails alone. An error before any request is computed fails all that run; a second one in a row, or a
    broken device, is raised.

    Args:
        runner: computes them.
        flights: id -> request.
    """

    def __init__(self, runner: Runner, flights: Mapping[str, InFlight]) -> None:
        self.runner, self._flights = runner, flights
        self._faults = 0  # errors in a row that belong to no request
        self._suspects: dict[str, None] = {}
        self._drawn: list[tuple[InFlight, Drawn]] = []

    def step(self, running: Sequence[str]) -> Outcome:
        """Compute one forward pass.

        Args:
            running: the requests that the runner holds.
        """
        self._suspects = {id: None for id in self._suspects if id in self._flights}
        self._drawn, self.runner.current = [], []
        try:
            self.runner.step(self._choose, only=next(iter(self._suspects), None))
        except Exception as error:
            return Outcome(failed=self._failed(error, running))
        self._faults = 0
        for id in self.runner.current:
            self._suspects.pop(id, None)
        return Outcome(self._drawn)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        flights = [self._flights[row.id] for row in rows]
        drawn = draw(logits, [flight.sampler for flight in flights])
        self._drawn = list(zip(flights, drawn, strict=True))
        return [max(one.token, 0) for one in drawn]

    def _failed(self, error: Exception, running: Sequence[str]) -> dict[str, str]:
        logger.error("a forward pass failed", exc_info=error)
        ids, reason = list(self.runner.current), f"{type(error).__name__}: {error}"
        broken = isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)
        if not ids:
            self._faults += 1
        if broken or self._faults > 1:
            raise error
        if len(ids) > 1:
            for id in ids:
                self.runner.restart(id)
                self._suspects[id] = None
            return {}
        return dict.fromkeys(ids or running, reason)
