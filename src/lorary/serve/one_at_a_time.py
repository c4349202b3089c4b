"""An engine that generates for one request after another: slow and simple, the measure of the others' answers."""

from __future__ import annotations

import queue
import threading
import time
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
from lorary.serve.engine import AdapterCard, BusyError, RequestError, UnknownAdapterError
from lorary.serve.request import Deliver, Finished, FinishReason, Request, Token


class OneAtATime:
    """See `lorary.serve.engine.Engine`.

    Args:
        model: the base, in evaluation mode.
        tokenizer: the base's.
        name: of the base.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.max_context = max_context(text_config(model))
        self._adapters: dict[str, Adapter] = {}
        self._cards: dict[str, AdapterCard] = {}
        self._queue: queue.Queue[tuple[Request, Deliver] | None] = queue.Queue(maxsize=256)
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
        card = AdapterCard(name, uid, folder, "ready", "low rank", r, method=str(adapter.method), created=time.time())
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

    def statistics(self) -> dict[str, Any]:
        return {"waiting": self._queue.qsize()}

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            request, deliver = item
            try:
                deliver(self._generate(request, deliver))
            except Exception as error:
                deliver(Finished("error", error=str(error)))

    def _is_cancelled(self, request: Request) -> bool:
        return self._ending or request.id in self._cancelled

    @torch.inference_mode()
    def _generate(self, request: Request, deliver: Deliver) -> Finished:
        adapters = {name: self._adapters[name] for name in request.adapters}
        switch(self.model, None)
        if list(request.adapters.values()) == [1.0]:
            switch(self.model, next(iter(adapters.values())))
        elif adapters:
            switch(self.model, mix(adapters, weights=list(request.adapters.values())))
        sampling, tokens = request.sampling, list(request.prompt)
        generator = torch.Generator()
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        eos, ids, text, cache = self.model.generation_config.eos_token_id, list[int](), "", None
        ends = set() if sampling.ignore_eos else set(eos if isinstance(eos, list) else [eos])
        while len(ids) < sampling.max_tokens and not self._is_cancelled(request):
            out = self.model(torch.tensor([tokens if cache is None else ids[-1:]]), past_key_values=cache)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            logprobs = logits.log_softmax(-1)
            if sampling.temperature == 0:
                new = int(logits.argmax())
            else:
                probabilities = (logits / sampling.temperature).softmax(-1)
                new = int(torch.multinomial(probabilities, 1, generator=generator))
            ids.append(new)
            if new in ends:
                return Finished("stop", "", len(tokens), 0, len(ids))
            whole = self.tokenizer.decode(ids, skip_special_tokens=True)
            top = logprobs.topk(sampling.logprobs or 0)
            pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            deliver(Token(new, whole[len(text) :], float(logprobs[new]), pairs))
            text = whole
        reason: FinishReason = "cancelled" if self._is_cancelled(request) else "length"
        return Finished(reason, "", len(tokens), 0, len(ids))
