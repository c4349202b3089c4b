"""A real server on a free port, for tests: uvicorn in a thread, around an engine on the built-in base."""

from __future__ import annotations

import functools
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lorary
from lorary.model.loading.from_pretrained import load_model, load_tokenizer
from lorary.model.loading.source import ModelSection
from lorary.serve.address import bind
from lorary.serve.http.app import create_app
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server
from lorary.serve.http.settings import MIB, Settings
from lorary.serve.interface import Engine
from lorary.serve.open import open_engine
from tests.tiny import shaken

BASE = "builtin:base"
KEY, OTHER_KEY, ADMIN_KEY = "the-key-of-anna", "the-key-of-bert", "the-key-of-an-admin"


def base(name: str = BASE) -> Any:
    """The built-in base in fp32."""
    return load_model(ModelSection.of(name, dtype="float32"))


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(ModelSection.of(BASE))


def save_adapter(folder: Path, seed: int, *presets: str, **options: Any) -> Path:
    """A trained-looking adapter of the built-in base."""
    model = base()
    lorary.attach(model, lorary.plan(model, lorary.method(*(presets or ("lora",)), **({"r": 4, "alpha": 8} | options))))
    lorary.save(shaken(model, 0.05, seed), folder)
    return folder


def started_engine(adapters: Mapping[str, Path], root: Path) -> Engine:
    """An engine on the built-in base, with adapters below a root."""
    engine = open_engine(BASE, adapters, dtype="float32", root=root, budget=64 * MIB)
    engine.start()
    return engine


def request(method: str, path: str, body: Any = None, *headers: str, key: str = "") -> bytes:
    """A request as the bytes that a client sends."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", *headers]
    lines += ["Content-Type: application/json"] if data else []
    lines += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode() + data


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of an error in OpenAI's shape, every key of which is there."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == self.status
        assert error["type"]
        return str(error["message"])


@dataclass
class Live:
    """A server that runs.

    Args:
        engine: its engine.
        port: on localhost.
        traffic: its requests.
        key: that `ask` sends.
    """

    engine: Engine
    port: int
    traffic: Traffic
    key: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, key: str | None = None
    ) -> Answer:
        """Send a request; a body that is not bytes is sent as JSON."""
        key = self.key if key is None else key
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        data = body
        if body is not None:
            sent["Content-Type"] = "application/json"
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, sent | dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **options: Any) -> Answer:
        return self.ask("POST", path, body, **options)

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection on which bytes have been sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def alive(self) -> None:
        """The server still answers."""
        assert self.ask("GET", "/health").status == 200
        body = {"model": BASE, "prompt": "x", "max_tokens": 1, "temperature": 0}
        answer = self.post("/v1/completions", body)
        assert answer.status == 200, answer.body


@contextmanager
def live(engine: Engine, settings: Settings | None = None, key: str = "") -> Iterator[Live]:
    """A server around a started engine, until the end of the block."""
    settings, traffic, ready = settings or Settings(), Traffic(), threading.Event()
    app = create_app(engine, settings, traffic)
    with bind("127.0.0.1", 0) as listener:
        server = Server(app, settings, traffic, stop=lambda: None, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield Live(engine, listener.getsockname()[1], traffic, key)
        finally:
            traffic.drain(0)
            thread.join(30)
            assert not thread.is_alive()
