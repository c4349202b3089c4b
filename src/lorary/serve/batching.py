"""The engine: requests with their own adapters, computed together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.serve.engine import AdapterCard, BusyError, RequestError
from lorary.serve.in_flight import InFlight
from lorary.serve.layers import ServedLayers
from lorary.serve.request import Deliver, FinishReason, Request
from lorary.serve.runner import Row, Runner
from lorary.serve.sampler import draw
from lorary.serve.store import Store

logger = logging.getLogger(__name__)


class BatchingEngine:
    """See `lorary.serve.engine.Engine`.

    Args:
        tokenizer: of the base.
        name: of the base.
        runner: computes the forward passes.
        layers: of the base.
        store: holds the adapters.
        ends: the end-of-sequence tokens.
        max_context: of the base.
        most_waiting: requests that wait, at most.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        runner: Runner,
        layers: ServedLayers,
        store: Store,
        *,
        ends: Collection[int],
        max_context: int | None,
        most_waiting: int = 1024,
    ) -> None:
        self.tokenizer, self.name, self.max_context = tokenizer, name, max_context
        self.runner, self.layers, self.store = runner, layers, store
        self._ends, self._most_waiting = frozenset(ends), most_waiting
        self._wake = threading.Condition()  # guards the next four
        self._waiting: dict[str, InFlight] = {}
        self._cancelled: set[str] = set()
        self._closing = False
        self._dead: str | None = None
        self._running: dict[str, InFlight] = {}  # the engine's thread alone changes it
        self._suspects: dict[str, None] = {}  # of a forward pass that failed: computed one by one
        self._drawn: list[tuple[InFlight, Any]] = []
        self._thread: threading.Thread | None = None

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="lorary-engine", daemon=True)
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        with self._wake:
            self._closing = True
            self._wake.wait_for(lambda: not (self._waiting or self._running or self._dead), timeout=drain)
            self._cancelled.update(self._waiting, self._running)
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.store.close()

    def submit(self, request: Request, deliver: Deliver) -> None:
        self._check(request)
        loans = [self.store.borrow(name, self._notify) for name in request.adapters]
        flight = InFlight(request, deliver, loans, self.tokenizer)
        with self._wake:
            try:
                self._require_room()
            except BusyError:
                for loan in loans:
                    loan.end()
                raise
            self._waiting[request.id] = flight
            self._wake.notify_all()

    def cancel(self, id: str) -> None:
        with self._wake:
            self._cancelled.add(id)
            self._wake.notify_all()

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        return self.store.load(name, folder, replace=replace, pinned=pinned)

    def unload(self, name: str) -> None:
        self.store.unload(name)

    def adapters(self) -> list[AdapterCard]:
        return self.store.cards()

    def why_dead(self) -> str | None:
        return self._dead

    def statistics(self) -> dict[str, Any]:
        with self._wake:
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "kv_usage": self.runner.usage(),
            }

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _check(self, request: Request) -> None:
        prompt, problems = len(request.prompt), []
        if not prompt:
            problems.append(Diagnostic("prompt", "has no token"))
        if self.max_context is not None and prompt >= self.max_context:
            what = f"the prompt has {prompt} tokens, and the context is {self.max_context}"
            problems.append(Diagnostic("prompt", what))
        if problems:
            raise RequestError("cannot serve the request:", problems)

    def _require_room(self) -> None:
        if self._dead is not None or self._closing:
            raise BusyError("", [Diagnostic("", "the engine stops", "ask again later")])
        if len(self._waiting) >= self._most_waiting:
            raise BusyError("", [Diagnostic("", "the queue is full", "ask again later")])

    # --- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:
            logger.exception("the engine has died")
            self._dead = f"{type(error).__name__}: {error}"
            self._end_all("error", self._dead)
        finally:
            self._end_all("cancelled")
            self.layers.remove()
            self.runner.close()

    def _turn(self) -> bool:
        """Wait for something to do, and do a little of it; False at the end."""
        with self._wake:
            self._wake.wait_for(self._has_work, timeout=None)
            cancelled, self._cancelled = self._cancelled, set()
            waiting = list(self._waiting.values())
            if self._closing and not (waiting or self._running):
                return False
        for id in cancelled:
            self._end(id, "cancelled")
        self._admit([flight for flight in waiting if not flight.done])
        if self._running:
            self._step()
        return True

    def _has_work(self) -> bool:
        ready = any(all(loan.ready for loan in flight.loans) for flight in self._waiting.values())
        return bool(self._running or ready or self._cancelled or self._closing)

    def _admit(self, waiting: Sequence[InFlight]) -> None:
        """Let requests join the batch whose adapters are in memory."""
        for flight in waiting:
            if len(self._running) < self.runner.most_rows and all(loan.ready for loan in flight.loans):
                self._begin(flight)

    def _begin(self, flight: InFlight) -> None:
        request = flight.request
        with self._wake:
            self._waiting.pop(request.id, None)
            self._running[request.id] = flight
        try:
            forms = [loan.bring() for loan in flight.loans]
            for form in forms:
                self.layers.cover(form)
            adapters = sorted(zip(forms, request.adapters.values(), strict=True), key=lambda one: one[0].uid)
            if self.max_context is not None:
                flight.limit = min(flight.limit, self.max_context - len(request.prompt))
            flight.row = Row(request.id, request.prompt, tuple(adapters))
            self.runner.add(flight.row)
        except Exception as error:
            self._end(request.id, "error", str(error))

    def _step(self) -> None:
        suspect = next(iter(self._suspects), None)
        self._drawn = []
        try:
            self.runner.step(self._choose, only=suspect)
        except Exception as error:
            self._failed(error)
            return
        for id in self.runner.current:
            self._suspects.pop(id, None)
        for flight, drawn in self._drawn:
            flight.take(drawn, self._ends)
            if flight.done:
                self._end(flight.request.id, "stop")

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        flights = [self._running[row.id] for row in rows]
        drawn = draw(logits, [flight.sampler for flight in flights])
        self._drawn = list(zip(flights, drawn, strict=True))
        return [max(one.token, 0) for one in drawn]

    def _failed(self, error: Exception) -> None:
        """After a forward pass that raised: its requests are computed one by one, so that the guilty one fails alone."""
        logger.error("a forward pass failed", exc_info=error)
        ids = list(self.runner.current)
        if not ids:
            raise error
        if len(ids) == 1:
            self._end(ids[0], "error", f"{type(error).__name__}: {error}")
            return
        for id in ids:
            self.runner.restart(id)
            self._suspects[id] = None

    def _end(self, id: str, reason: FinishReason, error: str = "") -> None:
        with self._wake:
            flight = self._running.pop(id, None) or self._waiting.pop(id, None)
            self._suspects.pop(id, None)
        if flight is not None:
            self.runner.remove(id)
            flight.finish(reason, error)
            self._notify()

    def _end_all(self, reason: FinishReason, error: str = "") -> None:
        for id in [*self._running, *self._waiting]:
            self._end(id, reason, error)
