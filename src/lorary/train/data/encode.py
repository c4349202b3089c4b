"""Text as token ids: one BOS, an EOS that ends the answer, and a boundary between prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorary.model.loading.prompt_tokens import encode_text as encode_text
from lorary.train.data import chat
from lorary.train.data._messages import Messages
from lorary.train.data.chat import Masked
from lorary.train.data.row_formats import Preference


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


def with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids, ending with EOS if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def added_ids(tokenizer: Any) -> dict[int, bool]:
    """The ids of added tokens, and whether each is special; of some tokenizers the end of a turn is not."""
    added = {i: bool(token.special) for i, token in tokenizer.added_tokens_decoder.items()}
    return added | dict.fromkeys(tokenizer.all_special_ids, True)


def end_answers(ids: list[int], mask: list[bool], tokenizer: Any, special: Mapping[int, bool]) -> Masked:
    """The mask of every answer, extended to the token that ends it; the last answer gets an EOS if it has no end."""
    mask = list(mask)
    closed = False
    for start, stop in _runs(mask):
        last = stop - 1  # white space after the end is not part of the answer
        while last > start and ids[last] not in special and not decode(tokenizer, ids[last : last + 1]).strip():
            last -= 1
        closed = ids[last] in special
        after = ids[stop] if stop < len(ids) else -1
        # an added token that is not special, such as `</tool_call>`, ends a text and not a turn
        is_text = closed and last == stop - 1 and not special[ids[last]] and special.get(after, False)
        if after in special and (is_text or not closed):  # the template's marks exclude the end of the turn
            mask[stop] = closed = True
        elif closed:
            mask[last + 1 : stop] = [False] * (stop - 1 - last)
    if closed or not any(mask) or tokenizer.eos_token_id is None:
        return ids, mask
    stop = _runs(mask)[-1][1]
    return [*ids[:stop], tokenizer.eos_token_id], [*mask[:stop], True]


def _runs(mask: list[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *mask], [*mask, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def preference(tokenizer: Any, example: Preference, special: Mapping[int, bool]) -> tuple[dict[str, list[int]], bool]:
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
            ids, start = _answer(tokenizer, example, answer, special)
        sides.append((ids, start))
    start = min(start for _, start in sides)
    prompt, other = (ids[:start] for ids, _ in sides)
    if prompt != other:
        raise ValueError("the prompt has different tokens before the two answers")
    chosen, rejected = (ids[start:] for ids, _ in sides)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}, shares


def _answer(
    tokenizer: Any, example: Preference, answer: Messages, special: Mapping[int, bool]
) -> tuple[list[int], int]:
    """(ids through the end of the answer, its start)."""
    assert not isinstance(example.prompt, str)
    before = chat.render(tokenizer, example.prompt, example.tools, prompt=True)
    through = chat.render(tokenizer, example.prompt + answer, example.tools)
    if not through.startswith(before):
        raise ValueError("the chat template renders the prompt differently when an answer follows")
    masked = chat.mask_spans(tokenizer, through, [(len(before), len(through))])
    ids, mask = end_answers(*masked, tokenizer, special)
    return ids[: len(mask) - mask[::-1].index(True)], mask.index(True)
