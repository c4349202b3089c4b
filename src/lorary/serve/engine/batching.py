"""The engine: requests with their own adapters, computed together."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lorary.errors import Diagnostic, LoraryError
from lorary.serve.batch.layers import ServedLayers
from lorary.serve.engine.arrivals import Arrivals
from lorary.serve.engine.forward_passes import ForwardPasses
from lorary.serve.engine.in_flight import InFlight
from lorary.serve.engine.request_checks import length_problems, request_problems
from lorary.serve.engine.runner import Row, Runner
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.forms.weighted import check_weights
from lorary.serve.interface import AdapterCard, BusyError, RequestError, Statistics
from lorary.serve.pool.registry import Registry
from lorary.serve.request import Deliver, FinishReason, Request
from lorary.serve.scheduler.admission import Admission
from lorary.serve.scheduler.policy import Policy

logger = logging.getLogger(__name__)
_HEADLINE = "cannot serve the request:"


class BatchingEngine:
    """See `lorary.serve.interface.Engine`.

    A request waits outside of the queue while its adapters load, then in the queue until the policy admits it, and is
    then in the batch until its end.

    Args:
        tokenizer: of the base.
        name: of the base.
        runner: computes the forward passes.
        layers: of the base.
        registry: of the adapters.
        policy: of the queue.
        ends: the end-of-sequence tokens.
        vocabulary: tokens of the base.
        max_context: of the base.
        most_waiting: requests that wait, at most.
    """

    def __init__(
        self,
        tokenizer: Any,
        name: str,
        runner: Runner,
        layers: ServedLayers,
        registry: Registry,
        policy: Policy,
        *,
        ends: Collection[int],
        vocabulary: int,
        max_context: int | None,
        most_waiting: int = 1024,
    ) -> None:
        self.tokenizer, self.name, self.max_context = tokenizer, name, max_context
        self.runner, self.layers, self.registry = runner, layers, registry
        self._ends, self._vocabulary, self._most_waiting = frozenset(ends), vocabulary, most_waiting
        self._wake = threading.Condition()  # guards the next five
        self._flights: dict[str, InFlight] = {}
        self._arrivals = Arrivals(registry, self._notify, policy.patience)
        self._cancelled: set[str] = set()
        self._closing = False
        self._dead: str | None = None
        self._admission = Admission(policy)
        self._passes = ForwardPasses(runner, self._flights)
        self._ended = deque[float](maxlen=32)  # times
        self._counts: Statistics = {"begun": 0, "queue_seconds": 0.0, "prefix_queries": 0, "prefix_hits": 0}
        self._thread: threading.Thread | None = None

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="lorary-engine", daemon=True)
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        with self._wake:
            self._closing = True
            self._wake.wait_for(lambda: not self._flights or self._dead, timeout=drain)
            self._cancelled.update(self._flights)
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        else:
            self._leave()
        self.registry.loader.close()

    def submit(self, request: Request, deliver: Deliver) -> None:
        if problems := list(request_problems(request, self._vocabulary)):
            raise RequestError(_HEADLINE, problems)
        with self._wake:
            self._require_room(request)
        flight = InFlight(request, deliver, self.tokenizer)
        try:
            self._arrivals.borrow(flight)
            if flight.ready and not flight.errors:
                self._check_adapters(flight)
            with self._wake:
                self._require_room(request)
                self._flights[request.id] = flight
                self._arrivals.add(flight)
                self._wake.notify_all()
        except BaseException:
            flight.give_back()
            raise

    def cancel(self, id: str) -> None:
        with self._wake:
            self._cancelled.add(id)
            self._wake.notify_all()

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        trusted = self._thread is None  # before the start they are its owner's
        return self.registry.load(name, folder, replace=replace, pinned=pinned, trusted=trusted)

    def unload(self, name: str) -> None:
        self.registry.unload(name)

    def adapters(self) -> list[AdapterCard]:
        with self._wake:
            running = set(self._admission.running)
            flights = [(id in running, lease.name) for id, flight in self._flights.items() for lease in flight.leases]
        counts = Counter(flights)
        return [
            replace(card, running=counts[True, card.name], waiting=counts[False, card.name])
            for card in self.registry.cards()
        ]

    def adapter(self, name: str) -> AdapterCard:
        return self.registry.card(name)

    def why_dead(self) -> str | None:
        if self._dead is None and self._thread is not None and not self._thread.is_alive() and not self._closing:
            return "its thread has ended"
        return self._dead

    def statistics(self) -> Statistics:
        with self._wake:
            running = len(self._admission.running)
            figures: Statistics = {"running": running, "waiting": len(self._flights) - running, **self._counts}
        pool, loader = self.registry.pool.statistics(), self.registry.loader
        figures |= {"adapter_bytes": pool["taken_bytes"], "host_bytes": pool["host_bytes"], "hits": pool["hits"]}
        figures |= {"evictions": pool["evictions"], "loads": loader.count, "load_seconds": loader.seconds}
        budget, adapters = len(self.runner.arena.sectors) * self.runner.arena.sector_bytes, figures["adapter_bytes"]
        kv = max(self.runner.used_bytes() - adapters, 0)
        return figures | {"budget_bytes": budget, "kv_bytes": kv, "kv_usage": kv / max(budget - adapters, 1)}

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _check_adapters(self, flight: InFlight) -> None:
        """Refuse what these adapters cannot do for the request.

        Raises:
            RequestError: every reason.
        """
        request, forms = flight.request, {lease.name: lease.form for lease in flight.leases}
        check_weights(forms, request.adapters)
        context = self._context(forms.values())
        if problems := list(length_problems(request, context, self.runner.most_tokens)):
            raise RequestError(_HEADLINE, problems)

    def _context(self, forms: Iterable[ServingForm]) -> int | None:
        """The context with these adapters: one that scales RoPE is alone."""
        return max((form.max_context for form in forms if form.max_context is not None), default=self.max_context)

    def _require_room(self, request: Request) -> None:
        if self._dead is not None or self._closing:
            raise BusyError("no new requests:", [Diagnostic("", "the engine stops", "ask again later")])
        if request.id in self._flights:
            raise RequestError(_HEADLINE, [Diagnostic(request.id, "the id is taken")])
        waiting = len(self._flights) - len(self._admission.running)
        if waiting >= self._most_waiting:
            what = f"{waiting} requests wait already"
            error = BusyError("the queue is full:", [Diagnostic("", what, "ask again later")])
            error.retry_after = self._seconds_until_room()
            raise error

    def _seconds_until_room(self) -> float:
        """An estimate by the requests that have ended of late: a tenth of those that wait have to end before."""
        seconds = time.monotonic() - self._ended[0] if self._ended else 1.0
        rate = max(len(self._ended), 1) / max(seconds, 0.01)
        return min(max(self._most_waiting / 10 / rate, 1.0), 60.0)

    # --- in the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:
            logger.exception("the engine has died")
            with self._wake:
                self._dead = f"{type(error).__name__}: {error}"
        finally:
            self._leave()

    def _leave(self) -> None:
        """End all requests, and leave the model as it was."""
        for id, flight in list(self._flights.items()):
            for end in (partial(self._end, id), flight.finish):  # whatever it has died of: nobody waits for ever
                with suppress(Exception):
                    end("error" if self._dead else "cancelled", self._dead or "")
        self.layers.remove()
        self.runner.close()

    def _turn(self) -> bool:
        """Wait for something to do, and do a little of it; False at the end."""
        with self._wake:
            self._wake.wait_for(self._has_work, timeout=self._time_to_wait())
            cancelled, self._cancelled = self._cancelled, set()
            if self._closing and not self._flights:
                return False
        for id in cancelled:
            self._end(id, "cancelled")
        self._enqueue()
        self._admit()
        if self._admission.running:
            self._step()
        return True

    def _has_work(self) -> bool:
        return bool(self._admission.running or self._arrivals.has_news or self._cancelled or self._closing)

    def _time_to_wait(self) -> float | None:
        times = [] if (first := self._arrivals.next_deadline) is None else [first]
        if self._admission.waiting:
            times.append(min(self._admission.until, time.monotonic() + 1.0))
        return max(min(times) - time.monotonic(), 0.001) if times else None

    def _enqueue(self) -> None:
        """Move the requests whose adapters are in memory into the queue."""
        with self._wake:
            found = self._arrivals.sort(self._flights)
        for id, (reason, error) in found.ended.items():
            self._end(id, reason, error)
        for flight in found.ready:
            self._admission.add(flight.pending)

    def _admit(self) -> None:
        """Let requests join the batch."""
        now = time.monotonic()
        if not self._admission.due(now):
            return
        decision = self._admission.decide(now, **self.registry.pool.memory(self._admission.waiting.wanted))
        for id in decision.expired:
            self._end(id, "deadline", "it could not begin in time")
        for id, reason in decision.refused.items():
            self._end(id, "refused", reason)
        for i, id in enumerate(decision.admit):
            if not self._begin(self._flights[id]):
                self._admission.put_back(decision.admit[i:], now + 0.1)
                break

    def _begin(self, flight: InFlight) -> bool:
        """Compute a request from now on; False if its adapters find no room."""
        request = flight.request
        try:
            self._check_adapters(flight)
            forms = [lease.bring() for lease in flight.leases]
            if None in forms:
                for lease in flight.leases:
                    lease.leave_batch()
                if any(other.row is not None for other in list(self._flights.values())):
                    return False  # they will free some
                raise RequestError(_HEADLINE, [Diagnostic("adapters", "have no room beside the base together")])
            self._join(flight, [form for form in forms if form is not None])
        except LoraryError as error:
            self._end(request.id, "refused", str(error))
        return True

    def _join(self, flight: InFlight, forms: Sequence[ServingForm]) -> None:
        request, weights = flight.request, list(flight.request.adapters.values())
        for form in forms:
            self.layers.cover(form)
        limits = [limit for limit in (self._context(forms), self.runner.most_tokens) if limit is not None]
        flight.limit = min([flight.limit, *(limit - len(request.prompt) for limit in limits)])
        adapters = sorted(zip(forms, weights, strict=True), key=lambda one: one[0].uid)
        flight.row = Row(request.id, request.prompt, tuple(adapters))
        self.runner.add(flight.row)
        self._counts["begun"] += 1
        self._counts["queue_seconds"] += time.monotonic() - flight.arrived

    def _step(self) -> None:
        outcome = self._passes.step(self._admission.running)
        for id, reason in outcome.failed.items():
            self._end(id, "error", reason)
        for flight, drawn in outcome.drawn:
            first = not flight.generated
            flight.take(drawn, self._ends)
            self._count(flight, first)
            if flight.done:
                self._end(flight.request.id, "stop")

    def _count(self, flight: InFlight, first: bool) -> None:
        prompt, cached = len(flight.request.prompt), flight.row.cached if flight.row else 0
        self._admission.computed(flight.request.id, prompt if first else 0, 1)
        if first:
            self._counts["prefix_queries"] += prompt
            self._counts["prefix_hits"] += cached

    def _end(self, id: str, reason: FinishReason, error: str = "") -> None:
        with self._wake:
            flight = self._flights.pop(id, None)
            self._arrivals.remove(id)
            if flight is None:
                return
            self._admission.remove(id)
            self._wake.notify_all()
        self.runner.remove(id)
        flight.finish(reason, error)
        with self._wake:
            self._arrivals.freed()
        self._ended.append(time.monotonic())
