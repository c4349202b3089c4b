"""Continuations by Transformers' `generate`, of several prompts at once, equal to those of each prompt alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorary.adapters.save_load import load_adapter
from lorary.adapters.switch import load, switch
from lorary.cli._generation import Answer, Printer, Sampling, room
from lorary.model.cached import cached
from lorary.model.state import max_text, state_of
from lorary.serve.engine.in_flight import end_tokens


class PlainWriter:
    """See `lorary.cli._generation.Writer`. Prompts are padded on the left.

    Args:
        model: the base, without an adapter, in evaluation mode.
        tokenizer: of the base.
        folders: name -> folder of the adapters.
        sampling: how tokens are drawn.
        seed: of the draws.
        rows: prompts at a time.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folders: Mapping[str, Path], sampling: Sampling, seed: int, rows: int
    ) -> None:
        self._model, self.tokenizer, self._folders = model, tokenizer, folders
        self._sampling, self._rows = sampling, rows
        torch.manual_seed(seed)

    @property
    def context(self) -> int | None:
        return max_text(self._model)

    def use(self, name: str | None) -> None:
        if name is not None and state_of(self._model) is None:
            load(self._model, self._folders[name])
        else:
            switch(self._model, None if name is None else load_adapter(self._folders[name]))

    def write(self, rows: Sequence[Sequence[int]], printer: Printer | None = None) -> Iterator[Answer]:
        for part in self._batches(rows):
            yield from self._batch([list(rows[i]) for i in part], printer)

    def close(self) -> None:
        pass

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """The numbers of the rows of each batch, in order.

        Rows whose answers the context cuts short are alone: in a batch they would cut the others short too.
        """
        part: list[int] = []
        for i, row in enumerate(rows):
            left = room(self.context, len(row))
            alone = left is not None and left < self._sampling.max_new_tokens
            if part and (alone or len(part) == self._rows):
                yield part
                part = []
            part.append(i)
            if alone:
                yield part
                part = []
        if part:
            yield part

    def _batch(self, rows: Sequence[list[int]], printer: Printer | None) -> list[Answer]:
        model, width, pad = self._model, max(map(len, rows)), self.tokenizer.pad_token_id
        if pad is None:
            pad = 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        left, most = room(self.context, width if len(rows) == 1 else 0), self._sampling.max_new_tokens
        options = {"max_new_tokens": most if left is None else min(most, left), **self._sampling.options()}
        with torch.inference_mode(), cached(model):
            output = model.generate(ids, attention_mask=mask, pad_token_id=pad, streamer=printer, **options)
        return [self._answer(row) for row in output[:, width:].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        """The answer up to the first token that ends it: shorter ones of a batch are padded after it."""
        ends = end_tokens(self._model)
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        return Answer(str(self.tokenizer.decode(ids[:stop], skip_special_tokens=True)), ended=stop is not None)
