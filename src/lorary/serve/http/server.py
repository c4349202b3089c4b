"""uvicorn around the application: limits on connections, a drain on SIGTERM.

The one file that builds on uvicorn's classes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorary.errors import check_overridden
from lorary.serve.address import cannot_listen
from lorary.serve.http.errors import ApiError, log
from lorary.serve.http.limits import Traffic
from lorary.serve.http.settings import Settings

_HEADER_BYTES = 16 * 1024  # of a request at most
_FILES = 8192  # the soft limit on open files that the server asks for
_FEW_FILES = "at most %d connections at a time: the process may open %d files (raise the hard limit: ulimit -Hn)"
_WAITING = 2048  # connections that the system holds until they are accepted
_KEEP_ALIVE = 30  # seconds that a connection without a request stays open
_CLOSING = 2  # seconds for the last bytes of the answers, after the drain

# Methods of uvicorn that are overridden here -> their arguments.
OVERRIDDEN: dict[type, dict[str, tuple[str, ...]]] = {
    uvicorn.Server: {"startup": ("sockets",), "handle_exit": ("sig", "frame"), "on_tick": ("counter",)},
    H11Protocol: {
        "connection_made": ("transport",),
        "data_received": ("data",),
        "on_response_complete": (),
        "connection_lost": ("exc",),
        "send_400_response": ("msg",),
    },
}
for _cls, _methods in OVERRIDDEN.items():
    check_overridden(_cls, _methods, "uvicorn")


class Server(uvicorn.Server):
    """A server that answers SIGTERM and Ctrl-C with a drain: no new requests, the running ones end, then it returns.

    A second signal leaves them no time: they end with an error, and the server returns. A third ends the process, as
    the engine may hang.

    Args:
        app: the application, made with the same traffic.
        settings: of the application.
        traffic: the requests in flight.
        stop: ends the requests that still run at the end of the drain.
        ready: called when the server takes requests.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        traffic: Traffic,
        *,
        stop: Callable[[], Any],
        ready: Callable[[], Any] = lambda: None,
    ) -> None:
        most, burst = _connections(settings.connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(settings.body_seconds, most),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=burst,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_CLOSING,
                h11_max_incomplete_event_size=_HEADER_BYTES,
            )
        )
        self._traffic, self._drain, self._stop, self._ready = traffic, settings.drain, stop, ready
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for one in sockets or ():
            try:
                one.listen(_WAITING)
            except OSError as error:  # another program has bound the address too, and listens since
                host, port = one.getsockname()[:2]
                raise cannot_listen(host, port, error) from None
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(_WAITING)  # asyncio has set it to the number that it accepts at once
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 2:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._traffic.drain(self._drain if self._signals == 1 else 0)

    async def on_tick(self, counter: int) -> bool:
        if self._traffic.drained and not self.should_exit:
            self.should_exit = True
            await run_in_threadpool(self._stop)
        return await super().on_tick(counter)


def _connections(wanted: int) -> tuple[int, int]:
    """(connections at most, of them accepted at once), so that file descriptors are left to read adapters.

    Without descriptors, asyncio tries again and again to accept what waits, and logs each time.
    """
    if sys.platform == "win32":
        return wanted, _WAITING
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:  # 1,024 by default, for programs that use select()
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    spare = (_FILES if soft == resource.RLIM_INFINITY else soft) - len(os.listdir("/dev/fd"))
    most = max(1, min(wanted, spare // 2))
    if most < wanted:
        log.warning(_FEW_FILES, most, soft)
    return most, max(1, min(_WAITING, spare // 16))


def _protocol(seconds: float, most: int) -> type[H11Protocol]:
    """uvicorn's protocol with two limits: a time for a request to arrive, and a number of connections.

    The first that are too many get a 503, those beyond no answer.
    """

    class Protocol(H11Protocol):
        _arrival: asyncio.TimerHandle | None = None
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            over = len(self.connections) - most
            if over > most // 4:
                transport.abort()
            elif over > 0:
                what = f"the server has {most:,} connections already"
                self._refuse(ApiError(503, what, headers={"Retry-After": "5"}))
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            if not self._refused:
                super().data_received(data)
                self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE:  # uvicorn closes it when nothing comes
                self._cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock at the connection or the first byte of a request; stop it at the last byte."""
            if self._refused:
                return
            if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
                self._cancel()
            elif self._arrival is None:
                # the application answers a late body itself; this is for late headers, and for bodies it did not read
                self._arrival = self.loop.call_later(seconds + 1, self._late)

        def _cancel(self) -> None:
            if self._arrival is not None:
                self._arrival.cancel()
                self._arrival = None

        def _late(self) -> None:
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and not self._refused:
                self.transport.write(_raw(ApiError(408, "the request did not arrive in time")))
            self.transport.close()

        def send_400_response(self, msg: str) -> None:
            what = f"this is no valid HTTP request, or its headers have more than {_HEADER_BYTES:,} bytes"
            self._refuse(ApiError(400, what))

        def _refuse(self, error: ApiError) -> None:
            self.transport.write(_raw(error))
            self.transport.write_eof()
            # what still comes is dropped for a while: closed at once, the client would be reset before it has read
            self._refused = True
            self._cancel()
            self._arrival = self.loop.call_later(_CLOSING, self._late)

    return Protocol


def _raw(error: ApiError) -> bytes:
    """The bytes of an error without a request: it cannot be read, is late, or its connection is one too many."""
    response = error.response()
    body = bytes(response.body)
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    head = "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {error.status} Error", *map(": ".join, headers.items())))
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
