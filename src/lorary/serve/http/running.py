"""Requests in the engine, seen from the event loop: submitted together, one stream of events, cancelled together."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from lorary.serve.http.errors import ApiError, log, printed_in_one_line, without_folders
from lorary.serve.interface import Engine
from lorary.serve.request import Event, Finished, Request, Token

DONE = "data: [DONE]\n\n"  # the last event of OpenAI's and SGLang's streams


class Running:
    """Requests in flight: an asynchronous iterator over (number of the request, event) until all have ended.

    Attributes:
        requests: the requests.
    """

    def __init__(self, engine: Engine) -> None:
        self.requests: Sequence[Request] = ()
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: dict[int, str] = {}  # number -> id

    @classmethod
    async def start(cls, engine: Engine, make: Callable[[], Sequence[Request]]) -> Running:
        """Submit what `make` returns; both happen in another thread, because tokenizing and loading take time.

        Raises:
            LoraryError: a request is refused; then none is left in the engine.
        """
        running = cls(engine)
        try:
            await run_in_threadpool(lambda: running._submit(make()))
        except BaseException:  # the client may go away meanwhile
            running.cancel()
            raise
        return running

    def _submit(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        for number, request in enumerate(requests):
            self._open[number] = request.id
            try:
                self._engine.submit(request, functools.partial(self._deliver, number))
            except BaseException:
                del self._open[number]
                raise

    def _deliver(self, number: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server stops
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, Finished):
                del self._open[number]
            yield number, event

    def cancel(self) -> None:
        """End the requests that still run."""
        for id in list(self._open.values()):
            self._engine.cancel(id)


@dataclass
class Answer:
    """The answer to a request, whole or as far as it has come."""

    tokens: list[Token] = field(default_factory=list)
    finished: Finished = field(default_factory=lambda: Finished("error"))

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.finished.text

    def take(self, event: Event) -> None:
        """Add an event to the answer.

        Raises:
            ApiError: the request ended without a complete answer.
        """
        if isinstance(event, Finished):
            check_finished(event)
            self.finished = event
        else:
            self.tokens.append(event)


async def collect(http: HTTPRequest, running: Running) -> list[Answer]:
    """The answers to all requests; they are cancelled when the client goes away.

    Raises:
        ApiError: one failed, or the client is gone.
    """
    answers = [Answer() for _ in running.requests]

    async def read() -> None:
        async for number, event in running:
            answers[number].take(event)

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    reading, going = asyncio.ensure_future(read()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((reading, going), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(408, "the client went away")
        reading.result()
    finally:
        reading.cancel()
        going.cancel()
        running.cancel()
    return answers


def check_finished(event: Finished) -> None:
    """Refuse the end of a request that has no complete answer.

    Raises:
        ApiError: it failed, its adapter cannot be served, it was cancelled by the server, or did not begin in time.
    """
    if event.reason == "error":
        log.error("the engine failed on a request: %s", event.error)
        raise ApiError(500, f"the engine failed on this request: {without_folders(event.error) or 'see its log'}")
    if event.reason == "refused":
        raise ApiError(400, printed_in_one_line(event.error))
    if event.reason == "cancelled":
        raise ApiError(503, "the request was cancelled: the server is shutting down", headers={"Retry-After": "5"})
    if event.reason == "deadline":
        what = event.error or "the request did not begin within its deadline"
        raise ApiError(503, without_folders(what), headers={"Retry-After": "5"})


class EventStream(StreamingResponse):
    """Server-sent events; when the response ends, however it does, its requests are cancelled."""

    def __init__(self, running: Running, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


def sse(value: Any) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
