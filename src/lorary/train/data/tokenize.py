"""Examples as rows of token ids with labels: the trainer's input, and all that it sees of the data.

An answer ends with a token that is in the loss, and a row begins with at most one BOS. Both go wrong often and
silently, so `lorary.train.data.lint` checks them again on the finished rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.config.config import DataSection
from lorary.train.data import chat, encode, task_tokens
from lorary.train.data._records import BadRows, convert, source_of
from lorary.train.data.row_formats import Chat, Example, Pair, Preference, Text
from lorary.train.data.task_rows import Judged, Labelled, Labels, Prompt

IGNORED = -100
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")
Row = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """Tokenized rows.

    Args:
        rows: for SFT `input_ids` and `labels` (IGNORED outside the loss); for DPO and reward models `prompt_ids`,
            `chosen_ids` and `rejected_ids`; for the others see `lorary.train.data.task_tokens`.
        lengths: tokens per example, before truncation.
        truncated: number of examples that lost tokens.
        dropped: number of examples that were left out for their length.
        split: number of examples that became several rows.
        joined: number of examples whose prompt and answer share a token.
        plain: whether every token is in the loss, as in plain text.
        sources: the file or data set of every row.
        has_answers: whether the rows end with an answer to learn; prompts and labelled texts do not.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    joined: int = 0
    plain: bool = False
    sources: tuple[str, ...] = ()
    has_answers: bool = True


def tokenize(examples: Sequence[Example], tokenizer: Any, section: DataSection, labels: Labels | None = None) -> Tokens:
    """Rows of at most `section.max_length` tokens.

    Args:
        examples: of one kind, as `lorary.train.data.load.load` returns them.
        tokenizer: a fast Transformers tokenizer; it gets the template that `section.chat_template` names.
        section: the `data` section of the configuration.
        labels: of a classification.

    Raises:
        DataError: a chat template is missing or refuses a row; rows are too long and may not be cut; plain text with
            `loss: completion`.
    """
    chat.use_template(tokenizer, section.chat_template)
    first = examples[0]
    if isinstance(first, Text) and section.loss == "completion":
        what = "`completion` trains on answers only, and plain text has none"
        raise DataError("cannot mask the data:", [Diagnostic("data.loss", what, "use `all`, or rows with a prompt")])
    if isinstance(first, Chat) or not isinstance(getattr(first, "prompt", ""), str):
        chat.require_template(tokenizer, first.where)
    special = encode.special_ids(tokenizer)
    if isinstance(first, Judged | Prompt | Labelled):
        rows = convert(examples, lambda row: task_tokens.encoded(row, tokenizer, special, labels), "the data")
        return _fitted(examples, rows, section, joined=0, plain=isinstance(first, Labelled))
    everything = section.loss == "all" or isinstance(first, Text)
    encoded = convert(examples, lambda example: _encoded(example, tokenizer, special, everything), "the data")
    return _fitted(examples, [row for row, _ in encoded], section, sum(shares for _, shares in encoded), everything)


def _encoded(example: Example, tokenizer: Any, special: frozenset[int], everything: bool) -> tuple[Row, bool]:
    """The row of an example, and whether its prompt and answer share a token."""
    if isinstance(example, Preference):
        return encode.preference(tokenizer, example, special)
    shares = False
    if isinstance(example, Chat):
        ids, mask = encode.end_answers(*chat.encode(tokenizer, example), tokenizer, special)
    elif isinstance(example, Pair):
        ids, start, shares = encode.pair(tokenizer, example.prompt, example.completion)
        mask = [i >= start for i in range(len(ids))]
    else:
        assert isinstance(example, Text)
        ids = encode.with_eos(encode.encode_text(tokenizer, example.text), tokenizer)
        mask = [True] * len(ids)
    labels = [i if everything or learn else IGNORED for i, learn in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}, shares


def _fitted(examples: Sequence[Example], rows: list[Row], section: DataSection, joined: int, plain: bool) -> Tokens:
    """The rows within max_length, as `section.overlong` says."""
    most, policy, is_text = section.max_length, section.overlong, isinstance(examples[0], Text)
    if policy == "auto":
        policy = "split" if is_text else "error"
    if policy == "split" and not is_text:
        what = "`split` makes several rows of one, which only plain text allows"
        raise DataError("cannot shorten the data:", [Diagnostic("data.overlong", what, "use drop or truncate")])
    lengths = tuple(_length(row) for row in rows)
    if policy == "error":
        _refuse_overlong(lengths, examples, most)
    kept = [
        [row] if length <= most else _shortened(row, policy, most) for row, length in zip(rows, lengths, strict=True)
    ]
    dropped = sum(not parts for parts in kept)
    shortened = sum(length > most for length in lengths) - dropped
    return Tokens(
        rows=tuple(row for parts in kept for row in parts),
        lengths=lengths,
        truncated=shortened if policy == "truncate" else 0,
        dropped=dropped,
        split=shortened if policy == "split" else 0,
        joined=joined,
        plain=plain,
        has_answers=not isinstance(examples[0], Prompt | Labelled),
        sources=tuple(source_of(example.where) for example, parts in zip(examples, kept, strict=True) for _ in parts),
    )


def token_ids(row: Row) -> list[int]:
    """The ids of a row, or of its prompt and its first or only answer."""
    ids: list[int] = row["input_ids"] if "input_ids" in row else row["prompt_ids"] + _answers(row)[0]
    return ids


def _answers(row: Row) -> list[list[int]]:
    """The answers of a row after its prompt; one without tokens if it has none."""
    return [row[key] for key in ANSWERS if key in row] or [[]]


def _length(row: Row) -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["prompt_ids"]) + max(map(len, _answers(row)))


def _shortened(row: Row, policy: str, most: int) -> list[Row]:
    """The rows that replace one of more than `most` tokens; none if it is dropped."""
    if policy == "split":
        parts = [{key: ids[i : i + most] for key, ids in row.items()} for i in range(0, _length(row), most)]
        return [part for part in parts if len(part["input_ids"]) > 1]  # a single token predicts nothing
    if policy == "drop":
        return []
    if "input_ids" in row and "labels" not in row:
        return [task_tokens.shortened(row, most)]
    if "input_ids" in row:
        cut = {key: ids[:most] for key, ids in row.items()}
        return [cut] if any(label != IGNORED for label in cut["labels"][1:]) else []
    room = most - len(row["prompt_ids"])
    return [row | {key: row[key][:room] for key in ANSWERS if key in row}] if room > 0 else []


def _refuse_overlong(lengths: Sequence[int], examples: Sequence[Example], most: int) -> None:
    overlong = BadRows()
    for example, length in zip(examples, lengths, strict=True):
        if length > most:
            overlong.add(example.where, f"{length:,} tokens")
    if overlong.count:
        longest = max(lengths)
        fix = f"raise data.max_length to {longest}, or set data.overlong to drop or truncate"
        what = f"{overlong.count:,} of {len(lengths):,} rows are longer than data.max_length ({most:,} tokens):"
        raise DataError(what, [*overlong.problems, Diagnostic("", f"the longest has {longest:,} tokens", fix)])
