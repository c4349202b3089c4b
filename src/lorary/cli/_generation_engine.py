"""Continuations by the serving engine: prompts join and leave a batch, and share their beginnings."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from lorary.adapters.hub import OWN_FILES
from lorary.cli._generation import Answer, Printer, Sampling, Size
from lorary.errors import Diagnostic, LoraryError
from lorary.serve import request
from lorary.serve.budget import most_budget, token_bytes
from lorary.serve.open import engine_of
from lorary.serve.scheduler.policy import Policy

_BASE = "the base"  # has a space: no adapter can have this name
_SPARE = 32 * 2**20  # bytes


class EngineWriter:
    """See `lorary.cli._generation.Writer`.

    Args:
        model: the base, without an adapter, in evaluation mode.
        tokenizer: of the base.
        folders: name -> folder of the adapters.
        sampling: how tokens are drawn.
        seed: of the draws.
        size: what memory is taken for.

    Raises:
        LoraryError: the engine does not compute this base.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folders: Mapping[str, Path], sampling: Sampling, seed: int, size: Size
    ) -> None:
        self.tokenizer, self._folders, self._adapter = tokenizer, folders, ""
        self._sampling, self._seeds = sampling, random.Random(seed)
        # Transformers' `generate` draws from the 50 likeliest where a model names no number
        top_k = model.generation_config.top_k
        self._top_k = 50 if top_k is None else top_k
        self._engine = engine_of(
            model,
            tokenizer,
            _BASE,
            budget=min(_budget(model, folders, size), most_budget(model.device)),
            policy=Policy(max_running=size.rows),
            most_waiting=size.prompts,
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
        known = "" if name is None else f"adapter-{[*self._folders].index(name)}"  # any folder has a valid one
        if name is not None and known not in {card.name for card in self._engine.adapters()}:
            self._engine.registry.load(known, str(self._folders[name]), replace=False, pinned=False, trusted=True)
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
        sampling = request.Sampling(
            self._sampling.max_new_tokens,
            self._sampling.temperature,
            self._sampling.top_p,
            self._top_k,
            seed=self._seeds.getrandbits(64),
        )
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
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return Answer(text, ended=event.reason == "stop")


def _budget(model: Any, folders: Mapping[str, Path], size: Size) -> int:
    """Bytes for keys and values of as many sequences, and for the adapters; half of them are never adapters'."""
    files = [folder / name for folder in folders.values() for name in OWN_FILES]
    adapters = sum(os.stat(file).st_size for file in files if file.is_file())
    return 2 * token_bytes(model) * size.rows * size.tokens + 4 * adapters + _SPARE
