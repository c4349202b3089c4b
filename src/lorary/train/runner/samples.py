"""Short continuations by the base and by the adapted model, of prompts from the run's own rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import lorary
from lorary.analysis.run_sections import Sample
from lorary.model.state import eval_mode, max_text
from lorary.train.data.encode import decode
from lorary.train.data.tokenize import IGNORED, Row

COUNT, NEW_TOKENS, MOST_PROMPT = 3, 48, 512
SECONDS = 20.0  # of one continuation at most: a large model on a CPU must not hold up the end of a run
_PLAIN_PROMPT = 24  # tokens of a plain text, which has no prompt of its own


def continuations(model: Any, tokenizer: Any, rows: Sequence[Row]) -> tuple[Sample, ...]:
    """Greedy continuations of the first prompts of `rows` that are short enough.

    Args:
        model: with its adapter attached.
        tokenizer: of the model.
        rows: tokenized, held-out ones if there are any.

    Returns:
        None of them for a model that does not generate text, or for rows without a prompt.
    """
    if not model.can_generate():
        return ()
    room = min(MOST_PROMPT, (max_text(model) or MOST_PROMPT) - NEW_TOKENS)
    asked = list(_prompts(rows, room))
    with torch.no_grad(), eval_mode(model), lorary.cached(model):
        adapted = [_greedy(model, tokenizer, prompt) for prompt, _ in asked]
    with torch.no_grad(), eval_mode(model), lorary.disabled(model):
        base = [_greedy(model, tokenizer, prompt) for prompt, _ in asked]
    return tuple(
        Sample(decode(tokenizer, prompt), before, after, _text(tokenizer, rest) if rest else None)
        for (prompt, rest), before, after in zip(asked, base, adapted, strict=True)
    )


def _prompts(rows: Sequence[Row], room: int) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, what follows in the data) of the first rows with another prompt of at most `room` tokens."""
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        prompt, rest = _divided(row)
        if 0 < len(prompt) <= room and tuple(prompt) not in seen:
            seen.add(tuple(prompt))
            yield prompt, rest[:NEW_TOKENS]
        if len(seen) == COUNT:
            return


def _divided(row: Row) -> tuple[list[int], list[int]]:
    if "prompt_ids" in row:
        return row["prompt_ids"], row.get("chosen_ids", [])
    ids, labels = row["input_ids"], row.get("labels")
    if not isinstance(labels, list):  # a class, not an answer
        return [], []
    start = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    if start < 2:  # plain text: at most a BOS is without a label
        start = min(_PLAIN_PROMPT, len(ids) // 2)
    return ids[:start], ids[start:]


def _greedy(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    ids = torch.tensor([prompt], device=model.device)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS, "max_time": SECONDS}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **options)
    return _text(tokenizer, output[0, len(prompt) :].tolist())


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
