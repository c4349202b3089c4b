"""A request between its arrival and its end: what it has got so far, and when it has enough."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from lorary.serve.engine.runner import Row
from lorary.serve.engine.sampler import Drawn, Sampler
from lorary.serve.engine.text import TextStream
from lorary.serve.pool.lease import Entry, Lease
from lorary.serve.pool.registry import Registry
from lorary.serve.request import Deliver, Event, Finished, FinishReason, Request, Token
from lorary.serve.scheduler.pending import Pending

logger = logging.getLogger(__name__)


def end_tokens(model: Any) -> frozenset[int]:
    """The end-of-sequence tokens of a model, as its generation configuration names them."""
    ends = model.generation_config.eos_token_id
    return frozenset({ends} if isinstance(ends, int) else ends or ())


class InFlight:
    """A request in flight.

    Args:
        request: the request.
        deliver: gets its events; nothing after a `Finished`.
        tokenizer: of the base.
    """

    def __init__(self, request: Request, deliver: Deliver, tokenizer: Any) -> None:
        self.request, self.leases, self._entries = request, list[Lease](), list[Entry]()
        self._deliver: Deliver | None = deliver
        self.sampler = Sampler(request.sampling)
        self.arrived = time.monotonic()
        self.row: Row | None = None  # once it has begun
        self.generated = 0
        self.limit = request.sampling.max_tokens
        self._text = TextStream(tokenizer, request.prompt, request.sampling.stop)

    @property
    def done(self) -> bool:
        return self._deliver is None

    @property
    def ready(self) -> bool:
        """Whether its adapters are in memory, or have failed."""
        return len(self.leases) == len(self.request.adapters) and all(lease.ready for lease in self.leases)

    @property
    def busy(self) -> bool:
        """Whether the host has no room for one of its adapters now."""
        return any(lease.busy for lease in self.leases)

    @property
    def errors(self) -> list[str]:
        """Why its adapters cannot be used."""
        return [lease.error for lease in self.leases if lease.error]

    @property
    def refused(self) -> bool:
        """Whether all of these lie in the adapters' files."""
        return all(lease.refused for lease in self.leases if lease.error)

    @property
    def begin_by(self) -> float | None:
        """The time by which it must have begun."""
        return None if self.request.deadline is None else self.arrived + self.request.deadline

    @property
    def pending(self) -> Pending:
        """The request for the scheduling policy, once it is ready."""
        request, prompt = self.request, len(self.request.prompt)
        uids = tuple(sorted({lease.uid for lease in self.leases}))
        return Pending(request.id, uids, request.tenant, self.arrived, self.begin_by, prompt + self.limit, prompt)

    def bind(self, registry: Registry) -> None:
        """Fix what its adapters' names stand for, when it comes.

        Raises:
            UnknownAdapterError: an adapter is unknown.
        """
        self._entries = self._entries or [registry.entry(name) for name in self.request.adapters]

    def borrow(self, registry: Registry, when_ready: Callable[[], None]) -> None:
        """Lease its adapters, in the order of the request, all or none: see `Registry.lease`.

        Args:
            registry: of the adapters.
            when_ready: called from any thread when one becomes ready; at once if it is.
        """
        self.bind(registry)
        try:
            for entry in self._entries:
                lease = registry.lease(entry)
                self.leases.append(lease)
                lease.future.add_done_callback(lambda _: when_ready())
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Give its adapters back. In the engine's thread once one was brought."""
        leases, self.leases = self.leases, []
        for lease in leases:
            lease.release()

    def take(self, drawn: Drawn, ends: Collection[int]) -> None:
        """Accept the next token; `done` afterwards if it is the last.

        Args:
            drawn: the token.
            ends: the end-of-sequence tokens.
        """
        if drawn.error:
            return self.finish("error", drawn.error)
        self.generated += 1
        if drawn.token in ends and not self.request.sampling.ignore_eos:
            return self.finish("stop")
        text = self._text.push(drawn.token)
        self._send(Token(drawn.token, text, drawn.logprob, drawn.top))
        if self._text.stop is not None:
            self.finish("stop")
        elif self.generated >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """Deliver the end; nothing happens at a second call."""
        if self.done:
            return
        text = self._text.rest() if reason in ("stop", "length") else ""
        if self._text.stop is not None:
            reason = "stop"
        cached = self.row.cached if self.row else 0
        prompt = len(self.request.prompt)
        self._send(Finished(reason, text, prompt, cached, self.generated, error, self._text.stop))
        self._deliver = None
        self.give_back()

    def _send(self, event: Event) -> None:
        assert self._deliver is not None
        try:
            self._deliver(event)
        except Exception:  # the engine serves others, too
            logger.exception("delivering to %s failed", self.request.id)
