"""An engine for tests of the HTTP server whose events are written beforehand, or sent by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorary.errors import LoraryError
from lorary.serve.interface import AdapterCard, UnknownAdapterError
from lorary.serve.request import Deliver, Event, Request


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
