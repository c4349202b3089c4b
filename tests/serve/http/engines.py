"""Engines for the tests of the HTTP server: a real one on the built-in base with two adapters, and a scripted one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lorary
from lorary import builtin
from lorary.errors import LoraryError
from lorary.serve.engine import AdapterCard, UnknownAdapterError
from lorary.serve.http.app import create_app
from lorary.serve.http.limits import Traffic
from lorary.serve.http.server import Server, bind
from lorary.serve.http.settings import Settings
from lorary.serve.one_at_a_time import OneAtATime
from lorary.serve.request import Deliver, Event, Request


def save_adapter(model: Any, folder: Path, r: int, seed: int) -> None:
    """Save an adapter as after training, which changes greedy answers; the model stays as it was."""
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=r, alpha=2.0 * r), "all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.06)
    lorary.save(model, folder)
    lorary.detach(model)


def real_engine(root: Path) -> OneAtATime:
    """An engine, not started, with the adapters `one` and `two` of the folder `root`, in which `three` lies too."""
    model = builtin.load_model()
    for seed, (name, r) in enumerate({"one": 4, "two": 8, "three": 3}.items()):
        save_adapter(model, root / name, r, seed)
    engine = OneAtATime(model, builtin.load_tokenizer(), "base")
    for name in ("one", "two"):
        engine.load(name, str(root / name))
    return engine


class Scripted:
    """An engine whose events are written beforehand, or sent by hand.

    Args:
        events: for each request; None to send them by hand, through `delivers`.
        tokenizer: of the base.
        figures: its statistics.
    """

    name, max_context = "base", 256

    def __init__(self, events: Sequence[Event] | None = None, tokenizer: Any = None, **figures: Any) -> None:
        self.events, self.tokenizer, self.figures = events, tokenizer, figures
        self.cards = [AdapterCard("a", state="resident", bytes=300), AdapterCard("b", state="on disk")]
        self.delivers: dict[str, Deliver] = {}
        self.requests: list[Request] = []
        self.called: list[tuple[Any, ...]] = []
        self.refuse: LoraryError | None = None

    def submit(self, request: Request, deliver: Deliver) -> None:
        if self.refuse:
            raise self.refuse
        self.requests.append(request)
        self.delivers[request.id] = deliver
        for event in self.events or ():
            deliver(event)

    def adapters(self) -> list[AdapterCard]:
        return self.cards

    def adapter(self, name: str) -> AdapterCard:
        for card in self.cards:
            if card.name == name:
                return card
        raise UnknownAdapterError(f"no adapter has the name {name!r}")

    def statistics(self) -> dict[str, Any]:
        return self.figures

    def why_dead(self) -> str | None:
        return None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **options: self.called.append((name, *args, options))


@contextmanager
def served(engine: Any, settings: Settings | None = None) -> Iterator[str]:
    """The address of a real server in a thread."""
    settings, traffic = settings or Settings(drain=0.0), Traffic()
    ready = threading.Event()
    app = create_app(engine, settings, traffic)
    server = Server(app, settings, traffic, stop=lambda: None, ready=ready.set)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(20)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
