"""Text as token ids: one BOS, an EOS that ends the answer, and a boundary between prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorary.train.data import chat
from lorary.train.data.chat import Masked
from lorary.train.data.row_formats import Messages, Preference


def pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int, bool]:
    """(ids of prompt and completion with EOS, start of the completion, whether the two share a token).

    The prompt's tokens are those of the same prompt at inference, if that is possible.
    """
    asked, together = encode_text(tokenizer, prompt), encode_text(tokenizer, prompt + completion)
    if together[: len(asked)] == asked:
        return with_eos(together, tokenizer), len(asked), False
    apart = asked + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if decode(tokenizer, apart) == decode(tokenizer, together):
        return with_eos(apart, tokenizer), len(asked), False
    start = next(i for i, (a, b) in enumerate(zip([*asked, -1], [*together, -2], strict=False)) if a != b)
    return with_eos(together, tokenizer), start, True


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, white space untouched."""
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text with the tokenizer's own BOS, once, and without the EOS or separator that some append."""
    ids = list(tokenizer(text)["input_ids"])
    if not text:  # Transformers gives some tokenizers an EOS alone
        ids = [i for i in ids if i == tokenizer.bos_token_id]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]  # the text begins with a BOS of its own
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if len(ids) > 1 and ids[-1] in ends and not text.endswith(decode(tokenizer, ids[-1:])):
        ids.pop()
    return ids


def with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids, ending with EOS if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of special tokens, such as the end of a turn."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def end_answers(ids: list[int], mask: list[bool], tokenizer: Any, special: frozenset[int]) -> Masked:
    """The mask of every answer, extended to the token that ends it; the last answer gets an EOS if it has no end."""
    mask = list(mask)
    closed = False
    for start, stop in _runs(mask):
        last = stop - 1  # white space after the end is not part of the answer
        while last > start and ids[last] not in special and not decode(tokenizer, ids[last : last + 1]).strip():
            last -= 1
        closed = ids[last] in special
        if closed:
            mask[last + 1 : stop] = [False] * (stop - 1 - last)
        elif stop < len(ids) and ids[stop] in special:  # the template's marks exclude its end of turn
            mask[stop] = closed = True
    if closed or not any(mask) or tokenizer.eos_token_id is None:
        return ids, mask
    stop = _runs(mask)[-1][1]
    return [*ids[:stop], tokenizer.eos_token_id], [*mask[:stop], True]


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def preference(tokenizer: Any, example: Preference, special: frozenset[int]) -> tuple[dict[str, list[int]], bool]:
    """(ids of the prompt and of both answers, whether prompt and answer share a token).

    The prompt ends at the first token in which an answer diverges from it.
    """
    sides, shares = [], False
    for answer in (example.chosen, example.rejected):
        if isinstance(example.prompt, str) and isinstance(answer, str):
            ids, start, shared = pair(tokenizer, example.prompt, answer)
            shares |= shared
        else:
            assert not isinstance(example.prompt, str)
            assert not isinstance(answer, str)
            ids, start = _answer(tokenizer, example.prompt, answer, special)
        sides.append((ids, start))
    start = min(start for _, start in sides)
    prompt, other = (ids[:start] for ids, _ in sides)
    if prompt != other:
        raise ValueError("the prompt has different tokens before the two answers")
    chosen, rejected = (ids[start:] for ids, _ in sides)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}, shares


def _answer(tokenizer: Any, prompt: Messages, answer: Messages, special: frozenset[int]) -> tuple[list[int], int]:
    """(ids through the end of the answer, its start)."""
    before = chat.render(tokenizer, prompt, prompt=True)
    through = chat.render(tokenizer, prompt + answer)
    if not through.startswith(before):
        raise ValueError("the chat template renders the prompt differently when an answer follows")
    masked = chat.mask_spans(tokenizer, through, [(len(before), len(through))])
    ids, mask = end_answers(*masked, tokenizer, special)
    return ids[: len(mask) - mask[::-1].index(True)], mask.index(True)
