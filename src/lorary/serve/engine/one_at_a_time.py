"""An engine that generates for one request after another: slow and simple, the measure of the others' answers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

import torch

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.mix import mix
from lorary.adapters.content_hash import content_hash
from lorary.adapters.save_load import load_adapter
from lorary.adapters.switch import switch
from lorary.errors import Diagnostic, FileError, suggestion
from lorary.files.strict_json import show
from lorary.layers.rope import max_context, text_config
from lorary.layers.transformers_internals import cache_of
from lorary.serve.engine.in_flight import InFlight, end_tokens
from lorary.serve.engine.sampler import draw
from lorary.serve.interface import AdapterCard, BusyError, RequestError, Statistics, UnknownAdapterError
from lorary.serve.pool.adapter_root import changed_at
from lorary.serve.request import Deliver, Request
from lorary.spec.presets import presets_of


class OneAtATime:
    """See `lorary.serve.interface.Engine`.

    Args:
        model: the base, in evaluation mode.
        tokenizer: the base's.
        name: of the base.
        most_waiting: requests that wait at most.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, most_waiting: int = 256) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_context = max_context(text_config(model))
        self._ends = end_tokens(model)
        self._adapters: dict[str, Adapter] = {}
        self._on_model: tuple[tuple[int, float], ...] | None = None
        self._cards: dict[str, AdapterCard] = {}
        self._queue: queue.Queue[tuple[Request, Deliver] | None] = queue.Queue(maxsize=most_waiting)
        self._cancelled: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closing = self._ending = False

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, drain: float = 0.0) -> None:
        if self._thread is not None and not self._closing:
            self._closing = True
            self._queue.put(None)
            self._thread.join(drain)
        self._ending = True
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Request, deliver: Deliver) -> None:
        for name in request.adapters:
            self.adapter(name)
        if self.max_context is not None and len(request.prompt) >= self.max_context:
            what = f"the prompt has {len(request.prompt)} tokens, and the context is {self.max_context}"
            raise RequestError("", [Diagnostic("prompt", what)])
        try:
            if self._closing:
                raise BusyError("", [Diagnostic("", "the engine stops", "ask again later")])
            self._queue.put_nowait((request, deliver))
        except queue.Full:
            raise BusyError("", [Diagnostic("", "the queue is full", "ask again later")]) from None

    def cancel(self, id: str) -> None:
        self._cancelled.add(id)

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        if not replace and name in self._adapters:
            raise FileError("cannot load the adapter:", [Diagnostic(name, "the name is taken")])
        adapter = load_adapter(folder, model=self.model)
        ranks = [site.r for site in adapter.sites]
        uid, r = content_hash(adapter), max(ranks, default=None)
        method = ",".join(presets_of(adapter.method))
        card = AdapterCard(name, uid, folder, "ready", "low rank", r, method=method, created=changed_at(folder))
        self._adapters[name], self._cards[name] = adapter, card
        return card

    def unload(self, name: str) -> None:
        self.adapter(name)
        del self._cards[name], self._adapters[name]

    def adapters(self) -> list[AdapterCard]:
        return sorted(self._cards.values(), key=lambda card: card.name)

    def adapter(self, name: str) -> AdapterCard:
        if name not in self._cards:
            what = f"no adapter has the name {show(name)}"
            raise UnknownAdapterError("", [Diagnostic("", what, suggestion(name, self._cards))])
        return self._cards[name]

    def why_dead(self) -> str | None:
        return None

    def statistics(self) -> Statistics:
        return {"waiting": self._queue.qsize()}

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            request, deliver = item
            flight = InFlight(request, deliver, self.tokenizer)
            try:
                self._generate(flight)
            except Exception as error:
                flight.finish("error", f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def _generate(self, flight: InFlight) -> None:
        request = flight.request
        self._switch(request.adapters)
        if self.max_context is not None:
            flight.limit = min(flight.limit, self.max_context - len(request.prompt))
        new, cache = list(request.prompt), dict[str, Any]()
        while not flight.done:
            if self._ending or request.id in self._cancelled:
                return flight.finish("cancelled")
            out = self.model(torch.tensor([new]), use_cache=True, **cache)
            cache = cache_of(out)
            (drawn,) = draw(out.logits[:, -1].float(), [flight.sampler])
            flight.take(drawn, self._ends)
            new = [drawn.token]

    def _switch(self, adapters: Mapping[str, float]) -> None:
        """Put the adapters of a request on the model, unless they are on it."""
        found = {name: self._adapters[name] for name in adapters}
        key = tuple((id(adapter), adapters[name]) for name, adapter in found.items())
        if key == self._on_model:
            return
        self._on_model = None
        if list(adapters.values()) == [1.0]:
            switch(self.model, next(iter(found.values())))
        else:
            switch(self.model, mix(found, weights=list(adapters.values())) if found else None)
        self._on_model = key
