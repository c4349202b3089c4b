"""Continuations by Transformers' `generate`, of several prompts at once, equal to those of each prompt alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorary.adapters.save_load import load_adapter
from lorary.adapters.switch import load, switch
from lorary.cli._generation import Answer, Generation, Printer, room
from lorary.model.cached import cached
from lorary.model.state import max_text, state_of
from lorary.serve.engine.in_flight import end_tokens


class PlainWriter:
    """See `lorary.cli._generation.Writer`. Prompts are padded on the left."""

    def __init__(self, given: Generation) -> None:
        self._given = given
        torch.manual_seed(given.sampling.seed)

    @property
    def context(self) -> int | None:
        return max_text(self._given.model)

    def use(self, name: str | None) -> None:
        model, folders = self._given.model, self._given.folders
        if name is not None and state_of(model) is None:
            load(model, folders[name])
        else:
            switch(model, None if name is None else load_adapter(folders[name], model=model))

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
            alone = left is not None and left < self._given.sampling.max_new_tokens
            if part and (alone or len(part) == self._given.rows):
                yield part
                part = []
            part.append(i)
            if alone:
                yield part
                part = []
        if part:
            yield part

    def _batch(self, rows: Sequence[list[int]], printer: Printer | None) -> list[Answer]:
        model, sampling = self._given.model, self._given.sampling
        width, pad = max(map(len, rows)), self._given.tokenizer.pad_token_id
        if pad is None:
            pad = 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        left, most = room(self.context, width if len(rows) == 1 else 0), sampling.max_new_tokens
        options = {"max_new_tokens": most if left is None else min(most, left), **sampling.options()}
        with torch.inference_mode(), cached(model):
            output = model.generate(ids, attention_mask=mask, pad_token_id=pad, streamer=printer, **options)
        return [self._answer(row) for row in output[:, width:].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        """The answer up to the first token that ends it: shorter ones of a batch are padded after it."""
        ends = end_tokens(self._given.model)
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        return Answer(str(self._given.tokenizer.decode(ids[:stop], skip_special_tokens=True)), ended=stop is not None)
