"""An engine whose requests are counted and timed on their way in and out: the source of the metrics and of the page."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from lorary.serve.http.metrics import Metrics
from lorary.serve.interface import AdapterCard, Engine, Statistics
from lorary.serve.request import Deliver, Event, Request, Token


@dataclass
class Observation:
    """The times of a request in flight.

    Args:
        adapters: those it names.
        arrived: on `time.perf_counter`, as the other times.
        last: its newest token; None before the first.
        tokens: delivered so far.
    """

    adapters: tuple[str, ...]
    arrived: float = field(default_factory=time.perf_counter)
    last: float | None = None
    tokens: int = 0


class Observed:
    """An engine around another, with metrics; see `lorary.serve.interface.Engine`.

    Attributes:
        metrics: the instruments.
        tokens: generated since the start.
        first_tokens: seconds to the first token of the newest requests.
        changed: Unix time at which a request last came, began or ended.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokenizer, self.name, self.max_context = engine.tokenizer, engine.name, engine.max_context
        self._in_flight: dict[str, Observation] = {}
        self.tokens = 0
        self.first_tokens: deque[float] = deque(maxlen=100)
        self.changed = time.time()
        self.metrics = Metrics(self)

    def start(self) -> None:
        self._engine.start()

    def stop(self, drain: float = 0.0) -> None:
        self._engine.stop(drain)

    def submit(self, request: Request, deliver: Deliver) -> None:
        # before the engine has it: its events may come before `submit` returns
        flight = self._in_flight[request.id] = Observation(tuple(request.adapters))
        self.changed = time.time()
        try:
            self._engine.submit(request, lambda event: self._pass_on(request.id, flight, deliver, event))
        except BaseException:
            self._in_flight.pop(request.id, None)
            raise

    def cancel(self, id: str) -> None:
        self._engine.cancel(id)

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        return self._engine.load(name, folder, replace=replace, pinned=pinned)

    def unload(self, name: str) -> None:
        self._engine.unload(name)

    def adapters(self) -> list[AdapterCard]:
        return self._engine.adapters()

    def adapter(self, name: str) -> AdapterCard:
        return self._engine.adapter(name)

    def why_dead(self) -> str | None:
        return self._engine.why_dead()

    def statistics(self) -> Statistics:
        """The engine's figures; what routers require stands here if it has none of its own."""
        flights = list(self._in_flight.values())
        running = sum(flight.last is not None for flight in flights)
        own: Statistics = {"running": running, "waiting": len(flights) - running, "kv_usage": 0.0}
        return own | self._engine.statistics()

    def in_use(self) -> tuple[list[str], list[str]]:
        """The names of the adapters whose requests run, and of those whose requests only wait."""
        flights = list(self._in_flight.values())
        running = {name for flight in flights if flight.last is not None for name in flight.adapters}
        waiting = {name for flight in flights for name in flight.adapters} - running
        return sorted(running), sorted(waiting)

    def _pass_on(self, id: str, flight: Observation, deliver: Deliver, event: Event) -> None:
        now, metrics = time.perf_counter(), self.metrics
        if isinstance(event, Token):
            if flight.last is None:
                self.changed = time.time()
                self.first_tokens.append(now - flight.arrived)
                metrics.first_token.observe(now - flight.arrived)
            else:
                metrics.between_tokens.observe(now - flight.last)
            flight.last, flight.tokens = now, flight.tokens + 1
            self._count(1)
        else:
            self._in_flight.pop(id, None)
            self.changed = time.time()
            metrics.end_to_end.observe(now - flight.arrived)
            metrics.prompt_tokens.inc(event.prompt_tokens)
            # an end-of-sequence token is generated and not delivered
            self._count(max(0, event.generated_tokens - flight.tokens))
            metrics.finished(event.reason)
        deliver(event)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        self.metrics.new_tokens.inc(tokens)
