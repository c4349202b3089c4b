"""The engine as the HTTP side sees it: requests go to replicas, and start again elsewhere if one dies.

A request that is sampled gets a seed here, so that every request is a function of its prompt, its adapters and its
sampling. A second replica then generates the same tokens: those that the client has are compared and skipped, and the
stream goes on where it broke off. If they differ, the request fails rather than change in its middle.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import math
import secrets
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from lorary.errors import Diagnostic, FileError, LoraryError, did_you_mean
from lorary.files.strict_json import show
from lorary.serve.interface import AdapterCard, BusyError, RequestError, Statistics, UnknownAdapterError
from lorary.serve.ray.replica import Answer, Status, affinity
from lorary.serve.request import Deliver, Event, Finished, Request

logger = logging.getLogger(__name__)

_ATTEMPTS = 6  # replicas that a request is sent to
_PAUSE = 0.2  # seconds before the second attempt; doubled before each further one
_FRESH = 1.0  # seconds for which the replicas' state is not asked for again
_PATIENCE = 10.0  # seconds for a replica to tell its state
_SILENCE = 60.0  # seconds without any replica after which a front is of no use
_SHARED = "put its folder under --root: every replica finds it there"


class RemoteEngine:
    """See `lorary.serve.interface.Engine`.

    Args:
        handle: Ray Serve's handle of the replicas.
        tokenizer, name, max_context: the base's.
    """

    def __init__(self, handle: Any, tokenizer: Any, name: str, max_context: int | None) -> None:
        self.handle, self.tokenizer, self.name, self.max_context = handle, tokenizer, name, max_context
        self.retries = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="lorary-remote-engine")
        self._journeys: dict[str, Journey] = {}
        self._tasks: dict[str, concurrent.futures.Future[None]] = {}
        self._states: list[Status] = []
        self._asked = -math.inf
        self._answered = time.monotonic()
        self._lock = threading.Lock()
        self._stopping = False

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        self._stopping = True
        concurrent.futures.wait(list(self._tasks.values()), drain)
        for id in list(self._journeys):
            self.cancel(id)
        concurrent.futures.wait(list(self._tasks.values()), _PATIENCE)
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PATIENCE)

    def submit(self, request: Request, deliver: Deliver) -> None:
        if self._stopping:
            raise BusyError("", [Diagnostic("", "the server stops", "ask again later")])
        accepted = concurrent.futures.Future[None]()
        journey = self._journeys[request.id] = Journey(request, deliver, accepted)
        task = self._tasks[request.id] = asyncio.run_coroutine_threadsafe(self._serve(journey), self._loop)
        task.add_done_callback(lambda _: (self._tasks.pop(request.id, None), self._journeys.pop(request.id, None)))
        accepted.result()

    def cancel(self, id: str) -> None:
        if (journey := self._journeys.get(id)) is not None:
            self._loop.call_soon_threadsafe(journey.cancel)

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        raise FileError("cannot load the adapter:", [Diagnostic(name, "replicas share no state", _SHARED)])

    def unload(self, name: str) -> None:
        what = "replicas share no state"
        raise FileError("cannot unload the adapter:", [Diagnostic(name, what, "remove its folder from --root")])

    def adapters(self) -> list[AdapterCard]:
        return merged_cards(state.adapters for state in self._replicas())

    def adapter(self, name: str) -> AdapterCard:
        cards = {card.name: card for card in self.adapters()}
        if name not in cards:  # it may be new
            try:
                found = asyncio.run_coroutine_threadsafe(self._adapter(name), self._loop).result(_PATIENCE)
            except Exception as error:  # of Ray
                logger.warning("no replica answers: %r", error)
                raise BusyError("", [Diagnostic("", "no replica answers", "ask again later")]) from None
            if found is None:
                what = f"no adapter has the name {show(name)}"
                raise UnknownAdapterError("", [Diagnostic("", what, did_you_mean(name, cards))])
            cards[name] = found
        return cards[name]

    def why_dead(self) -> str | None:
        reasons = [state.why_dead for state in self._replicas()]
        if (silent := time.monotonic() - self._answered) > _SILENCE:
            return f"no replica has answered for {silent:.0f} s"
        return None if not reasons or None in reasons else reasons[0]

    def statistics(self) -> Statistics:
        states = self._replicas()
        found = merged_figures([state.statistics for state in states])
        own = {"replicas": len(states), "retries": self.retries}
        return cast(Statistics, {"running": 0, "waiting": 0, **found, **own})

    # --- requests ---

    async def _serve(self, journey: Journey) -> None:
        """Send a request to replicas until one has answered it."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        why = ""
        try:
            journey.start()
            for attempt in range(_ATTEMPTS):
                if attempt:
                    self.retries += 1
                    await asyncio.sleep(_PAUSE * 2 ** (attempt - 1))
                try:
                    if await self._attempt(journey):
                        return
                    why = "it ended before its answer did"
                except RayTaskError:  # raised by its own code: it would be raised elsewhere, too
                    logger.exception("a replica failed")
                    why = "it failed, and its log says why"
                    break
                except BackPressureError:
                    why = "the queue is full"
                    break
                except (RayError, RayServeException) as error:
                    why = type(error).__name__
            journey.end(Finished("error", error=f"no replica could serve the request: {why}"))
        except asyncio.CancelledError:
            journey.end(Finished("cancelled", "", len(journey.request.prompt), 0, len(journey.sent)))
        except DivergedError as error:
            journey.end(Finished("error", error=str(error)))
        except Exception:
            logger.exception("a request could not be sent to the replicas")
            journey.end(Finished("error", error="it could not be sent to a replica"))

    async def _attempt(self, journey: Journey) -> bool:
        """Whether a replica has answered the request to its end."""
        request = journey.begin()
        options = self.handle.options(stream=True, multiplexed_model_id=affinity(request))
        answers = options.generate.remote(request)
        try:
            async for answer in answers:
                if journey.take(answer):
                    return True
        except asyncio.CancelledError:
            answers.cancel()
            raise
        return False

    # --- the replicas ---

    def _replicas(self) -> list[Status]:
        """The state of every replica, not older than a second; the last one known while none answers."""
        with self._lock:
            if time.monotonic() - self._asked >= _FRESH:
                try:
                    found = asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result(2 * _PATIENCE)
                except Exception as error:  # of Ray, which is between two replicas
                    logger.warning("no replica tells its state: %r", error)
                    found = []
                self._asked = time.monotonic()
                if found:
                    self._states, self._answered = found, self._asked
            return self._states

    async def _adapter(self, name: str) -> AdapterCard | None:
        found: AdapterCard | None = await self.handle.adapter.remote(name)
        return found

    async def _ask(self) -> list[Status]:
        found = await self.handle.broadcast("status").results_async(timeout_s=_PATIENCE, return_exceptions=True)
        return [state for state in found if isinstance(state, Status)]


class Journey:
    """A request on its way through replicas, and what its client has of the answer.

    Args:
        request: the request.
        deliver: gets the tokens.
        accepted: is resolved once a replica has accepted or refused it.
    """

    def __init__(self, request: Request, deliver: Deliver, accepted: concurrent.futures.Future[None]) -> None:
        self.request, self.deliver, self.accepted = _replayable(request), deliver, accepted
        self.sent: list[int] = []
        self._again = 0  # tokens of this attempt
        self._task: asyncio.Task[None] | None = None
        self._cancelled = False

    def start(self) -> None:
        """Begin, in the task that serves it.

        Raises:
            CancelledError: it has been cancelled already.
        """
        self._task = asyncio.current_task()
        if self._cancelled:
            raise asyncio.CancelledError

    def cancel(self) -> None:
        """End it, in the thread of its task."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def begin(self) -> Request:
        """The request for the next replica; ids are unique among all processes that send requests to it."""
        self._again = 0
        return dataclasses.replace(self.request, id=f"{self.request.id}-{uuid.uuid4().hex}")

    def take(self, answer: Answer) -> bool:
        """Pass on what is new in an answer; whether it is the last."""
        if isinstance(answer, LoraryError):
            self._refused(answer)
            return True
        if not self.accepted.done():
            self.accepted.set_result(None)
        return any(self._take(event) for event in answer)  # the end is the last

    def _take(self, event: Event) -> bool:
        if isinstance(event, Finished):
            if event.reason == "cancelled":  # not by the client: the replica stops
                return False
            if event.reason in ("stop", "length") and self._again < len(self.sent):
                raise DivergedError(self._again)
            self.end(event)
            return True
        if self._again < len(self.sent):  # the client has it
            if self.sent[self._again] != event.id:
                raise DivergedError(self._again)
        else:
            self.sent.append(event.id)
            self.deliver(event)
        self._again += 1
        return False

    def _refused(self, error: LoraryError) -> None:
        if self.accepted.done():
            self.end(Finished("error", error=str(error)))
        else:
            self.accepted.set_exception(error)

    def end(self, finished: Finished) -> None:
        """Deliver the end, or refuse the request if no replica has accepted it."""
        if self.accepted.done():
            self.deliver(finished)
        elif finished.reason == "cancelled":
            self.accepted.set_result(None)
            self.deliver(finished)
        else:
            self.accepted.set_exception(BusyError("", [Diagnostic("", finished.error, "ask again later")]))


class DivergedError(RequestError):
    """Two replicas generate different tokens for one request."""

    def __init__(self, at: int) -> None:
        super().__init__(f"the replica that began this answer died, and another one differs from it at token {at + 1}")


def _replayable(request: Request) -> Request:
    """The request with a seed if it draws tokens without one."""
    sampling = request.sampling
    if sampling.temperature == 0 or sampling.seed is not None:
        return request
    return dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=secrets.randbits(31)))


_SHARES = ("kv_usage",)
_STATES = ("failed", "on disk", "draining", "loading", "ready", "resident")  # from the least to the most useful


def merged_cards(replicas: Iterable[Iterable[AdapterCard]]) -> list[AdapterCard]:
    """One card for each adapter: its best state on any replica, the requests of all."""
    found: dict[str, AdapterCard] = {}
    for card in (card for cards in replicas for card in cards):
        other = found.get(card.name)
        if other is not None:
            better = max(other, card, key=lambda one: _STATES.index(one.state) if one.state in _STATES else 0)
            running, waiting = other.running + card.running, other.waiting + card.waiting
            created = min(other.created, card.created)
            card = dataclasses.replace(better, created=created, running=running, waiting=waiting)
        found[card.name] = card
    return [found[name] for name in sorted(found)]


def merged_figures(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all replicas: sums, and the mean of shares."""
    names = dict.fromkeys(name for figures in replicas for name in figures)
    found = {name: [figures[name] for figures in replicas if name in figures] for name in names}
    return {name: sum(values) / (len(values) if name in _SHARES else 1) for name, values in found.items()}
