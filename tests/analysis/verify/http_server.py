"""A small OpenAI-compatible server that computes with real models, and may do so wrongly."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Served:
    """What a server serves, and how.

    Args:
        models: name -> model.
        tokenizer: of all of them.
        echoes: whether it gives the log-probabilities of a prompt.
        takes_ids: whether a prompt may be a list of tokens.
        chat_form: whether log-probabilities come in the form of chats.
        key: that it asks for.
        parents: name of an adapter -> that of its base, in the list of models.
        reply: instead of all this: (path) -> (status, bytes), or None for the usual one.
    """

    models: dict[str, Any]
    tokenizer: Any
    echoes: bool = True
    takes_ids: bool = True
    chat_form: bool = False
    key: str = ""
    parents: dict[str, str] = field(default_factory=lambda: {"tuned": "base"})
    reply: Callable[[str], tuple[int, bytes] | None] = lambda path: None
    requests: list[dict[str, Any]] = field(default_factory=list)

    def listed(self) -> dict[str, Any]:
        data = [{"id": name, "object": "model", "parent": self.parents.get(name)} for name in self.models]
        return {"object": "list", "data": data}

    def completion(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        prompt = body["prompt"]
        if not isinstance(prompt, str) and not self.takes_ids:
            return 400, {"error": {"message": "prompt must be a string"}}
        if body.get("echo") and not self.echoes:
            return 422, {"error": {"message": "echo is not supported"}}
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        with torch.no_grad():
            logits = self.models[body["model"]](input_ids=torch.tensor([ids])).logits[0].float()
        found = torch.log_softmax(logits, -1)
        text = self.tokenizer.decode
        values, tokens = found[-1].topk(body["logprobs"])
        top = [(text([token]), value) for value, token in zip(values.tolist(), tokens.tolist(), strict=True)]
        if self.chat_form:
            entries = [{"token": token, "logprob": value} for token, value in top]
            logprobs: dict[str, Any] = {"content": [{**entries[0], "top_logprobs": entries}]}
        else:
            own = [found[t, ids[t + 1]].item() for t in range(len(ids) - 1)] if body.get("echo") else []
            numbers = [None, *own, top[0][1]] if body.get("echo") else [top[0][1]]
            shown = [text([i]) for i in ids] if body.get("echo") else []
            logprobs = {"tokens": [*shown, top[0][0]], "token_logprobs": numbers, "top_logprobs": [dict(top)]}
        return 200, {"object": "text_completion", "choices": [{"index": 0, "text": top[0][0], "logprobs": logprobs}]}


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        version = {"version": "0.1 of the tests"}
        self._answer(lambda: (200, version if self.path == "/version" else self.served.listed()))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.served.requests.append(body)
        self._answer(lambda: self.served.completion(body))

    def _answer(self, usual: Callable[[], tuple[int, dict[str, Any]]]) -> None:
        if self.served.key and self.headers.get("Authorization") != f"Bearer {self.served.key}":
            status, data = 401, b'{"error": "Unauthorized"}'
        elif (planted := self.served.reply(self.path)) is not None:
            status, data = planted
        else:
            status, value = usual()
            data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has seen enough
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """The address of a server, inside the block."""
    handler = type("Handler", (Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
