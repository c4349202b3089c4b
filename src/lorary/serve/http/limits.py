"""Limits on requests before anything reads them: headers, size, time of arrival; and the drain at the end."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorary.serve.http.errors import ApiError
from lorary.serve.http.security import OPEN
from lorary.serve.http.settings import Settings

_DISCARDED = 16  # times the limit: the end of a body that is too large is read, so that its sender gets the answer


class Traffic:
    """The requests in flight, and whether the server still takes new ones."""

    def __init__(self) -> None:
        self.active = 0
        self.until: float | None = None  # the end of the drain, on the monotonic clock

    @contextmanager
    def one(self) -> Iterator[None]:
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    @property
    def draining(self) -> bool:
        return self.until is not None

    def drain(self, seconds: float) -> None:
        """Take no new request from now on, and leave those in flight these seconds at most."""
        self.until = min(time.monotonic() + seconds, math.inf if self.until is None else self.until)

    @property
    def drained(self) -> bool:
        """Whether the drain has begun, and all requests have ended or had their time."""
        return self.until is not None and (not self.active or time.monotonic() > self.until)


class Limits:
    """Middleware that reads the body of each request, within the limits, before the application sees the request."""

    def __init__(self, app: ASGIApp, settings: Settings, traffic: Traffic) -> None:
        self.app, self.settings, self.traffic = app, settings, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == OPEN:
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._read(receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        with self.traffic.one():
            await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        if self.traffic.draining:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "5", "Connection": "close"})
        if len(scope["headers"]) > self.settings.headers:
            what = f"{len(scope['headers'])} headers, more than the {self.settings.headers} that are accepted"
            raise ApiError(431, what, headers={"Connection": "close"})

    async def _read(self, receive: Receive) -> bytes:
        most, seconds, size = self.settings.body_bytes, self.settings.body_seconds, 0
        parts = []
        close = {"Connection": "close"}
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more and size <= _DISCARDED * most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client went away", headers=close)
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size <= most:
                        parts.append(chunk)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {math.ceil(seconds)} s", headers=close) from None
        if size > most:
            parts.clear()
            raise ApiError(413, f"the body has more than the {most:,} bytes that are accepted", headers=close)
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what the connection gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
