"""From text to token ids: one BOS, an EOS that ends the answer, and a boundary between prompt and answer."""

from __future__ import annotations

from typing import Any

from lorary.train.data import chat
from lorary.train.data.row_formats import Messages, Preference

Masked = tuple[list[int], list[bool]]  # token ids, and whether each is learnt


def pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int, bool]:
    """(ids of prompt and completion with EOS, where the completion starts, whether they share a token).

    The prompt's tokens are those that a user's prompt will have when the model is used, wherever that is possible.
    """
    asked, whole = plain(tokenizer, prompt), plain(tokenizer, prompt + completion)
    if whole[: len(asked)] == asked:
        return with_eos(whole, tokenizer), len(asked), False
    apart = asked + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if decoded(tokenizer, apart) == decoded(tokenizer, whole):
        return with_eos(apart, tokenizer), len(asked), False
    start = next(i for i, (a, b) in enumerate(zip([*asked, -1], [*whole, -2], strict=False)) if a != b)
    return with_eos(whole, tokenizer), start, True


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def plain(tokenizer: Any, text: str) -> list[int]:
    """Ids with the tokenizer's own BOS, once, and without the EOS or separator that some append."""
    ids = list(tokenizer(text)["input_ids"])
    if not text:  # transformers gives an EOS alone to some tokenizers
        ids = [i for i in ids if i == tokenizer.bos_token_id]
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]  # the text begins with a BOS of its own
    own_end = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if len(ids) > 1 and ids[-1] in own_end and not text.endswith(decoded(tokenizer, ids[-1:])):
        ids.pop()
    return ids


def with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that stand for no text of their own, such as the end of a turn."""
    return frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)


def end_answers(ids: list[int], mask: list[bool], tokenizer: Any, special: frozenset[int]) -> Masked:
    """Every answer's mask ends with the token that ends the answer; the last one gets an EOS where it has none."""
    mask = list(mask)
    closed = False
    for start, stop in _runs(mask):
        last = stop - 1  # white space behind the end of the answer is no part of it
        while last > start and ids[last] not in special and not decoded(tokenizer, ids[last : last + 1]).strip():
            last -= 1
        closed = ids[last] in special
        if closed:
            mask[last + 1 : stop] = [False] * (stop - 1 - last)
        elif stop < len(ids) and ids[stop] in special:  # the template's marks leave out its own end of turn
            mask[stop] = closed = True
    if closed or not any(mask) or tokenizer.eos_token_id is None:
        return ids, mask
    stop = _runs(mask)[-1][1]
    return [*ids[:stop], tokenizer.eos_token_id], [*mask[:stop], True]


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every stretch of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def preference(tokenizer: Any, example: Preference, special: frozenset[int]) -> tuple[dict[str, list[int]], bool]:
    """The prompt's ids and those of both answers: the prompt ends where the first of them diverges from it."""
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
    if sides[0][0][:start] != sides[1][0][:start]:
        raise ValueError("the prompt has different tokens before the two answers")
    chosen, rejected = (ids[start:] for ids, _ in sides)
    return {"prompt_ids": sides[0][0][:start], "chosen_ids": chosen, "rejected_ids": rejected}, shares


def _answer(tokenizer: Any, prompt: Messages, answer: Messages, special: frozenset[int]) -> tuple[list[int], int]:
    before = chat.render(tokenizer, prompt, prompt=True)
    through = chat.render(tokenizer, prompt + answer)
    if not through.startswith(before):
        raise ValueError("the chat template renders the prompt differently when an answer follows")
    encoded = tokenizer(through, add_special_tokens=False, return_offsets_mapping=True)
    mask = [start >= len(before) for start, _ in encoded["offset_mapping"]]
    ids, mask = end_answers(list(encoded["input_ids"]), mask, tokenizer, special)
    last = len(mask) - mask[::-1].index(True)
    return ids[:last], mask.index(True)
