"""Hostile clients: slow ones, floods, garbage. Each is answered or cut off, and the server goes on."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from fastapi import FastAPI

from lorary.errors import Diagnostic, LoraryError
from lorary.serve.address import bind
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server
from lorary.serve.http.settings import MIB, Settings
from lorary.serve.interface import BusyError, Engine
from lorary.serve.request import Deliver, Finished, Request, Token
from tests.serve.http.live import BASE, KEY, Answer, Live, live, request

pytestmark = pytest.mark.xdist_group("http")  # one server for all

COMPLETION = {"model": BASE, "prompt": "x", "max_tokens": 1, "temperature": 0}
SECONDS = 0.5
CHUNKED = request("POST", "/v1/completions", None, "Transfer-Encoding: chunked", key=KEY)
CHUNKED = CHUNKED.replace(b"Content-Length: 0\r\n", b"")


@pytest.fixture(scope="module")
def strict(engine: Engine, root: Path) -> Iterator[Live]:
    """A server without patience."""
    with live(engine, Settings(keys={KEY: "anna"}, root=root, body_seconds=SECONDS, body_bytes=MIB), KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def _alive(strict: Live) -> Iterator[None]:
    yield
    strict.alive()


def answers(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    connection.settimeout(20)
    parts = []
    with closing(connection):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def is_cut_off(connection: socket.socket, part: bytes, times: int, pause: float = 0.0) -> bool:
    """Whether the server closes a connection on which a part is sent again and again."""
    try:
        for _ in range(times):
            connection.sendall(part)
            time.sleep(pause)
    except ConnectionError:
        return True
    return False


def eventually(true: Callable[[], bool]) -> bool:
    """Whether this becomes true."""
    until = time.monotonic() + 20
    while not (found := true()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


def error(data: bytes) -> tuple[int, str]:
    """(status, message) of the one answer in these bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), Answer(int(head.split()[1]), {}, body).message


def test_headers_that_do_not_come(strict: Live) -> None:
    connections = [strict.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n") for _ in range(50)]
    connections += [strict.raw() for _ in range(50)]
    strict.alive()  # they take nobody's place
    for number in range(6):
        for connection in connections[:10]:
            try:
                connection.sendall(f"X-{number}: a\r\n".encode())
            except OSError:
                break  # cut off already
        time.sleep(SECONDS / 2)
    found = [answers(connection) for connection in connections[10:]]
    assert [error(data) for data in found[:40]] == [(408, "the request did not arrive in time")] * 40
    assert found[40:] == [b""] * 50  # those that have sent nothing
    for connection in connections[:10]:
        connection.close()


def test_a_body_that_does_not_come(strict: Live) -> None:
    head = request("POST", "/v1/completions", b"", key=KEY).replace(b"Content-Length: 0", b"Content-Length: 500")
    slow = strict.raw(head.replace(b"\r\n\r\n", b"\r\nContent-Type: application/json\r\n\r\n{"))
    assert error(answers(slow)) == (408, "the body did not arrive within 1 s")


def test_a_refused_body_that_never_ends(strict: Live) -> None:
    with strict.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n") as connection:
        assert b" 401 " in connection.recv(2000)
        connection.settimeout(20)
        assert is_cut_off(connection, b"x", 400, pause=0.05)


def test_a_prompt_of_ten_megabytes(strict: Live) -> None:
    body = {"model": BASE, "prompt": "x" * 10 * MIB}
    answer = strict.post("/v1/completions", body)
    assert (answer.status, answer.message) == (413, "the body has more than the 1,048,576 bytes that are accepted")
    assert strict.post("/v1/completions", body, key="").status == 401
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert error(answers(strict.raw(CHUNKED + chunk * 20 + b"0\r\n\r\n")))[0] == 413


def test_a_body_without_an_end_is_cut_off(strict: Live) -> None:
    with strict.raw(CHUNKED) as connection:
        assert is_cut_off(connection, b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 100_000)


def test_floods_of_headers(strict: Live) -> None:
    many = strict.ask("GET", "/v1/models", headers={f"X-{i}": "a" for i in range(200)})
    assert (many.status, many.message.partition(",")[0].split(" ", 1)[1]) == (431, "headers")
    assert many.message.endswith("more than the 100 that are accepted")
    long = strict.raw(request("GET", "/v1/models", None, "X-Long: " + "a" * 200_000, key=KEY))
    what = "this is no valid HTTP request, or its headers have more than 16,384 bytes"
    assert error(answers(long)) == (400, what)
    path = strict.raw(request("GET", "/" + "a" * 200_000, key=KEY))
    assert error(answers(path)) == (400, what)
    with strict.raw(b"GET / HTTP/1.1\r\n") as endless:
        assert is_cut_off(endless, b"X-A: " + b"a" * 1000 + b"\r\n", 400, pause=0.01)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: c\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"\r\n" * 100_000,
    ],
)
def test_what_is_not_http(strict: Live, garbage: bytes) -> None:
    with strict.raw() as connection:
        try:
            connection.sendall(garbage)
            data = answers(connection)
        except ConnectionError:  # cut off while it was still sending
            return
    assert data == b"" or error(data)[0] in (400, 408, 501)
    assert b"Traceback" not in data


def test_requests_in_one_packet_are_answered_in_turn(strict: Live) -> None:
    several = [request("GET", "/v1/models", key=KEY), request("POST", "/v1/completions", COMPLETION, key=KEY)] * 3
    with strict.raw(b"".join(several)) as connection:
        data = b""
        connection.settimeout(20)
        while data.count(b"HTTP/1.1 200") < 6 or not data.endswith(b"}"):
            data += connection.recv(65536)
    assert data.index(b'"object":"list"') < data.index(b'"object":"text_completion"')


def test_an_upgrade_is_not_one(strict: Live) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert strict.ask("GET", "/v1/models", headers=headers).status == 200


def test_a_stream_that_nobody_reads_stops_no_other(strict: Live) -> None:
    body = {"model": BASE, "prompt": [5] * 8, "max_tokens": 200, "stream": True, "n": 8, "logprobs": 20}
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(strict.raw(request("POST", "/v1/completions", body, key=KEY)))
        assert strict.ask("GET", "/v1/models").status == 200
    for _ in range(500):
        if strict.traffic.active == 0:
            break
        time.sleep(0.02)
    assert strict.traffic.active == 0


class Scripted:
    """An engine that does with a request what a test says; what it does not do, a real one does."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.dead = engine, None
        self.events: list[Token | Finished] | Exception = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.engine, name)

    def submit(self, request: Request, deliver: Deliver) -> None:
        if isinstance(self.events, Exception):
            raise self.events
        for event in self.events:
            deliver(event)

    def why_dead(self) -> str | None:
        return self.dead


def busy(seconds: float) -> BusyError:
    found = BusyError("", [Diagnostic("", "the queue is full", "ask again later")])
    found.retry_after = seconds
    return found


LEAK = Finished("error", error="CUDA out of memory in /srv/lorary/serve/batch/layers.py:7")
_BAD = "cannot serve the adapter 'x':\n  - rank: 64\n  - /srv/a.json: is missing"
_CUT = "the request was cancelled: the server is shutting down"


@pytest.mark.parametrize(
    ("events", "status", "message", "retry"),
    [
        (busy(2.2), 429, "the queue is full (ask again later)", "3"),
        (busy(0), 429, "the queue is full (ask again later)", "1"),
        ([LEAK], 500, "the engine failed on this request: CUDA out of memory in layers.py:7", None),
        (
            [Finished("refused", error=_BAD)],
            400,
            "cannot serve the adapter 'x': rank: 64; a.json: is missing",
            None,
        ),
        ([Token(5, "x"), Finished("cancelled")], 503, _CUT, "5"),
        ([Finished("deadline")], 503, "the request did not begin within its deadline", "5"),
        (ZeroDivisionError("secret"), 500, "the server failed on this request; its log says why", None),
    ],
)
def test_what_goes_wrong_in_the_engine(
    engine: Engine, events: list[Token | Finished] | Exception, status: int, message: str, retry: str | None
) -> None:
    scripted = Scripted(engine)
    scripted.events = events
    with live(scripted) as server:  # type: ignore[arg-type]
        answer = server.post("/v1/completions", COMPLETION)
        assert (answer.status, answer.message, answer.headers.get("retry-after")) == (status, message, retry)
        streamed = server.post("/v1/completions", COMPLETION | {"stream": True})
        if isinstance(events, Exception):  # before the answer has begun
            assert (streamed.status, streamed.message) == (status, message)
            return
        *_, last, done, rest = streamed.body.decode().split("\n\n")
        assert (streamed.status, done, rest) == (200, "data: [DONE]", "")
        assert json.loads(last.removeprefix("data: ")) == answer.json


def test_a_broken_adapter_below_the_root_is_refused_the_first_time_as_later(server: Live, root: Path) -> None:
    broken = root / "broken"
    broken.mkdir()
    try:
        (broken / "adapter_config.json").write_text("{}")
        answers = [server.post("/v1/completions", COMPLETION | {"model": "broken"}) for _ in range(2)]
    finally:
        shutil.rmtree(broken)
    assert [answer.status for answer in answers] == [400, 400]
    first, second = (answer.message for answer in answers)
    assert first == second
    assert "`peft_type`" in first


def test_health_is_the_engines(engine: Engine) -> None:
    scripted = Scripted(engine)
    with live(scripted) as server:  # type: ignore[arg-type]
        assert server.ask("GET", "/health").status == 200
        scripted.dead = "RuntimeError: /srv/secret"
        answer = server.ask("GET", "/health")
        assert (answer.status, answer.message) == (503, "the engine has stopped; its log says why")


def test_an_impossible_token_is_json(engine: Engine) -> None:
    scripted, nothing = Scripted(engine), float("-inf")
    scripted.events = [Token(5, "x", nothing, ((5, nothing),)), Finished("stop", prompt_tokens=1, generated_tokens=1)]
    with live(scripted) as server:  # type: ignore[arg-type]
        found = server.post("/v1/completions", COMPLETION | {"logprobs": 1}).json["choices"][0]["logprobs"]
        assert found["token_logprobs"] == list(found["top_logprobs"][0].values()) == [-9999.0]
        streamed = server.post("/v1/completions", COMPLETION | {"logprobs": 1, "stream": True}).body
        assert b"-9999.0" in streamed
        assert b"Infinity" not in streamed


@contextmanager
def all_connections_held(engine: Engine, most: int) -> Iterator[Live]:
    with live(engine, Settings(connections=most)) as server:
        with ExitStack() as stack:
            held = [stack.enter_context(closing(server.raw())) for _ in range(most)]
            held[-1].sendall(request("GET", "/health"))
            assert held[-1].recv(12) == b"HTTP/1.1 200"
            yield server
        assert eventually(lambda: server.ask("GET", "/health").status == 200)  # when it has seen that they have gone
        server.alive()


def test_a_connection_too_many_is_told_so(engine: Engine) -> None:
    with all_connections_held(engine, 4) as server:
        said = answers(server.raw())
        assert b"\r\nRetry-After: 5\r\n" in said
        assert error(said) == (503, "the server has 4 connections already")


def test_connections_beyond_those_that_are_told_get_no_answer(engine: Engine) -> None:
    with all_connections_held(engine, 3) as server:  # a quarter of 3 is none
        cut = server.raw()
        with suppress(ConnectionError):
            assert answers(cut) == b""


FLOODED = """
import logging, resource, socket, sys, threading, time
from fastapi import FastAPI
from lorary.serve.address import bind
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server
from lorary.serve.http.settings import Settings

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
listener, traffic, ready = bind("127.0.0.1", 0), Traffic(), threading.Event()
server = Server(FastAPI(), Settings(), traffic, stop=lambda: None, ready=ready.set)
thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
thread.start()
ready.wait(30)
print(listener.getsockname()[1], flush=True)
while not sys.stdin.readline():
    pass
print(open(sys.executable, "rb").readable())  # a file can still be opened
traffic.drain(0)
thread.join()
"""


def test_a_flood_of_connections_leaves_descriptors_for_files() -> None:
    """They are refused, and nothing is logged for each of them."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", FLOODED], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=20)))
            out, err = process.communicate("go\n", timeout=60)
    assert (process.returncode, out) == (0, "True\n")
    assert re.fullmatch(
        r"at most \d+ connections at a time: the process may open 64 files \(raise the hard limit: ulimit -Hn\)\n", err
    )


def test_an_address_that_another_server_has_begun_to_listen_at_meanwhile() -> None:
    """Both are bound while they load their bases."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with closing(first), closing(bind("127.0.0.1", port)) as second:
        first.listen()
        server = Server(FastAPI(), Settings(), Traffic(), stop=lambda: None)
        with pytest.raises(LoraryError, match=f"cannot listen:\n.*127.0.0.1:{port}: address already in use"):
            server.run(sockets=[second])
