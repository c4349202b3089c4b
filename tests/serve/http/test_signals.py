"""Signals to the server: the first begins the drain, the second ends it, the third ends the process."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time

import pytest

from lorary import builtin
from lorary.serve.address import bind
from lorary.serve.http.app import create_app
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server
from lorary.serve.http.settings import Settings
from lorary.serve.request import Finished, Token
from tests.serve.http.live import Live, request
from tests.serve.http.scripted import Scripted
from tests.serve.http.test_hostile import answers


def test_a_second_signal_ends_the_requests_with_an_error(caplog: pytest.LogCaptureFixture) -> None:
    engine, settings, traffic, ready = (
        Scripted(None, builtin.load_tokenizer()),
        Settings(),
        Traffic(),
        threading.Event(),
    )

    def stop() -> None:
        for deliver in engine.delivers.values():
            deliver(Finished("cancelled"))

    app = create_app(engine, settings, traffic)
    with bind("127.0.0.1", 0) as listener, caplog.at_level(logging.INFO):
        server = Server(app, settings, traffic, stop=stop, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        live = Live(engine, listener.getsockname()[1], traffic)
        body = {"model": "base", "prompt": "x", "max_tokens": 9}
        streamed, whole = (live.raw(request("POST", "/v1/completions", body | {"stream": s})) for s in (True, False))
        until = time.monotonic() + 30
        while len(engine.delivers) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        for deliver in engine.delivers.values():
            deliver(Token(300, "hello"))
        assert streamed.recv(12) == b"HTTP/1.1 200"
        server.handle_exit(signal.SIGTERM, None)
        thread.join(0.3)
        assert thread.is_alive()  # the drain has its 30 seconds
        server.handle_exit(signal.SIGTERM, None)
        ends = [answers(connection) for connection in (streamed, whole)]
        thread.join(30)
        assert not thread.is_alive()
    assert b"hello" in ends[0]
    assert b"the request was cancelled: the server is shutting down" in ends[0]
    assert ends[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert ends[1].startswith(b"HTTP/1.1 503 ")
    assert b"the request was cancelled: the server is shutting down" in ends[1]
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []


HUNG = """
import signal
from fastapi import FastAPI
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server
from lorary.serve.http.settings import Settings
server = Server(FastAPI(), Settings(), Traffic(), stop=lambda: None)
signal.signal(signal.SIGTERM, server.handle_exit)
for number in range(4):
    print(number, flush=True)
    signal.raise_signal(signal.SIGTERM)
"""


def test_a_third_signal_ends_a_process_that_hangs() -> None:
    ran = subprocess.run([sys.executable, "-c", HUNG], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGTERM, "0\n1\n2\n", "")
