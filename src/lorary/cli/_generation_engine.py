"""Continuations by the serving engine: prompts join and leave a batch, and share their beginnings."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import torch

from lorary.adapters.hub import OWN_FILES
from lorary.cli._generation import Answer, Generation, Printer
from lorary.errors import Diagnostic, LoraryError
from lorary.serve import request
from lorary.serve.budget import most_budget, token_bytes
from lorary.serve.open import engine_of
from lorary.serve.scheduler.policy import Policy

_BASE = "the base"  # has a space: no adapter can have this name
_SPARE = 32 * 2**20  # bytes


class EngineWriter:
    """See `lorary.cli._generation.Writer`.

    Raises:
        LoraryError: the engine does not compute this base.
    """

    def __init__(self, given: Generation) -> None:
        self._given, self._adapter, self._seeds = given, "", random.Random(given.sampling.seed)
        # Transformers' `generate` draws from the 50 likeliest where a model names no number
        top_k = given.model.generation_config.top_k
        self._top_k = 50 if top_k is None else top_k
        self._engine = engine_of(
            given.model,
            given.tokenizer,
            _BASE,
            budget=min(_budget(given), most_budget(given.model.device)),
            policy=Policy(max_running=given.rows),
            most_waiting=given.prompts,
        )
        self._engine.start()

    @property
    def context(self) -> int | None:
        own = self._engine.adapter(self._adapter).max_context if self._adapter else None
        return own or self._engine.max_context

    @property
    def most_tokens(self) -> int | None:
        """The tokens of a prompt and its answer that the memory holds."""
        return self._engine.runner.most_tokens

    def use(self, name: str | None) -> None:
        folders = self._given.folders
        known = "" if name is None else f"adapter-{[*folders].index(name)}"  # any folder has a valid one
        if name is not None and known not in {card.name for card in self._engine.adapters()}:
            self._engine.registry.load(known, str(folders[name]), replace=False, pinned=False, trusted=True)
        self._adapter = known

    def write(self, rows: Sequence[Sequence[int]], printer: Printer | None = None) -> Iterator[Answer]:
        asked = [self._asked(row) for row in rows]
        events: list[SimpleQueue[request.Event]] = [SimpleQueue() for _ in rows]
        try:
            for one, queue in zip(asked, events, strict=True):
                self._engine.submit(one, queue.put)
            for one, queue in zip(asked, events, strict=True):
                yield self._answer(one, queue, printer)
        finally:  # also when it is interrupted
            for one in asked:
                self._engine.cancel(one.id)

    def close(self) -> None:
        self._engine.stop()

    def _asked(self, row: Sequence[int]) -> request.Request:
        """The request, with a seed of its own: two that are equal are drawn independently."""
        how, seed = self._given.sampling, self._seeds.getrandbits(64)
        sampling = request.Sampling(how.max_new_tokens, how.temperature, how.top_p, self._top_k, seed=seed)
        return request.Request(tuple(row), {self._adapter: 1.0} if self._adapter else {}, sampling)

    def _answer(self, asked: request.Request, events: SimpleQueue[request.Event], printer: Printer | None) -> Answer:
        ids: list[int] = []
        if printer is not None:
            printer.put(torch.tensor([asked.prompt]))
        while isinstance(event := events.get(), request.Token):
            ids.append(event.id)
            if printer is not None:
                printer.put(torch.tensor([event.id]))
        if event.reason not in ("stop", "length"):
            raise LoraryError("cannot generate text:", [Diagnostic("", event.error or event.reason)])
        if printer is not None:
            printer.end()
        text = str(self._given.tokenizer.decode(ids, skip_special_tokens=True))
        return Answer(text, ended=event.reason == "stop")


def _budget(given: Generation) -> int:
    """Bytes for the keys and values of `rows` sequences and for the adapters, doubled: adapters get half at most."""
    files = [folder / name for folder in given.folders.values() for name in OWN_FILES]
    adapters = sum(os.stat(file).st_size for file in files if file.is_file())
    return 2 * token_bytes(given.model) * given.rows * given.tokens + 4 * adapters + _SPARE
