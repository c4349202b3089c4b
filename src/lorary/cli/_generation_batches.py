"""Continuations of several prompts at once, padded on the left, equal to those of each prompt alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorary.cli._generation import Printer, Sampling, room
from lorary.model.cached import cached


def batches(model: Any, rows: Sequence[Sequence[int]], size: int, wanted: int) -> Iterator[list[int]]:
    """The numbers of the rows of each batch, in order.

    Rows whose answers the context cuts short are alone: in a batch they would cut the others short too.
    """
    part: list[int] = []
    for i, row in enumerate(rows):
        left = room(model, len(row))
        alone = left is not None and left < wanted
        if part and (alone or len(part) == size):
            yield part
            part = []
        part.append(i)
        if alone:
            yield part
            part = []
    if part:
        yield part


def generate_rows(
    model: Any, tokenizer: Any, rows: Sequence[list[int]], sampling: Sampling, printer: Printer | None = None
) -> list[str]:
    """The continuation of every row, without special tokens.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        rows: token ids; all of them must have room for as many new tokens.
        sampling: how tokens are drawn.
        printer: prints the only row as it is generated.
    """
    width, pad = max(map(len, rows)), tokenizer.pad_token_id
    if pad is None:
        pad = 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    left = room(model, width if len(rows) == 1 else 0)
    most = sampling.max_new_tokens if left is None else min(sampling.max_new_tokens, left)
    with torch.inference_mode(), cached(model):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=most, pad_token_id=pad, streamer=printer, **sampling.options()
        )
    return [_text(model, tokenizer, row) for row in output[:, width:].tolist()]


def end_tokens(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def _text(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """The text of new tokens up to the first that ends the answer: shorter answers of a batch are padded after it."""
    ends = end_tokens(model)
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=True))
