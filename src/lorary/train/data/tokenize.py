"""Examples as rows of tokens, each with its labels: what the trainer eats, and all that it sees of the data.

The end of an answer is a token of its own that is learnt, and a row begins with at most one BOS: both go wrong
often and quietly, so `lorary.train.data.lint` checks them again on the finished rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.config.config import DataSection
from lorary.train.data import chat, encode
from lorary.train.data.records import BadRows, source_of
from lorary.train.data.row_formats import Chat, Example, Pair, Preference, Text

IGNORED = -100
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Tokens:
    """Finished rows.

    Args:
        rows: for SFT `input_ids` and `labels` (IGNORED where nothing is learnt); for DPO `prompt_ids`, `chosen_ids`
            and `rejected_ids`.
        lengths: tokens per example, before any was cut.
        truncated: examples that lost tokens.
        dropped: examples that were left out for their length.
        split: examples that became several rows.
        joined: examples whose prompt ends in a token that the answer shares.
        plain: whether everything is learnt, as in plain text.
        sources: of every row, the file or data set that it is from.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    joined: int = 0
    plain: bool = False
    sources: tuple[str, ...] = ()


def tokenize(examples: Sequence[Example], tokenizer: Any, section: DataSection) -> Tokens:
    """Rows of at most `section.max_length` tokens.

    Args:
        examples: of one kind, as `lorary.train.data.load.load` gives them.
        tokenizer: a fast Transformers tokenizer; gets the template that `section.chat_template` names.
        section: the `data` section of the configuration.

    Raises:
        DataError: a chat template is missing or refuses a row; rows are too long and may not be cut; a mask is asked
            for that this data does not have.
    """
    chat.use_template(tokenizer, section.chat_template)
    kind = type(examples[0])
    if kind is Text and section.loss == "completion":
        what = "`completion` learns answers alone, and plain text has none"
        raise DataError("cannot mask the data:", [Diagnostic("data.loss", what, "use `all`, or rows with a prompt")])
    conversations = kind is Chat or (kind is Preference and not isinstance(examples[0].prompt, str))  # type: ignore[union-attr]
    if conversations:
        chat.require_template(tokenizer, examples[0].where)
    if kind is Preference:
        return _preferences(examples, tokenizer, section)
    encoded, joined = _encoded(examples, tokenizer)
    everything = section.loss == "all" or kind is Text
    rows = [_row(ids, [True] * len(ids) if everything else mask) for ids, mask in encoded]
    return _fitted(rows, examples, section, joined=joined, plain=kind is Text or everything)


def _row(ids: list[int], mask: list[bool]) -> Row:
    return {"input_ids": ids, "labels": [i if learn else IGNORED for i, learn in zip(ids, mask, strict=True)]}


# --- SFT --------------------------------------------------------------------------------------------------------


def _encoded(examples: Sequence[Example], tokenizer: Any) -> tuple[list[encode.Masked], int]:
    """Ids and mask of every example, and how many share a token between prompt and answer."""
    encoded, offenders, joined = [], BadRows(), 0
    special = encode.special_ids(tokenizer)
    for example in examples:
        try:
            if isinstance(example, Chat):
                encoded.append(encode.end_answers(*chat.encode(tokenizer, example), tokenizer, special))
            elif isinstance(example, Pair):
                ids, start, shares = encode.pair(tokenizer, example.prompt, example.completion)
                joined += shares
                encoded.append((ids, [i >= start for i in range(len(ids))]))
            else:
                assert isinstance(example, Text)
                ids = encode.with_eos(encode.plain(tokenizer, example.text), tokenizer)
                encoded.append((ids, [True] * len(ids)))
        except ValueError as error:
            offenders.add(example.where, str(error))
    offenders.refuse("the data", len(examples))
    return encoded, joined


# --- lengths ----------------------------------------------------------------------------------------------------


def _fitted(rows: list[Row], examples: Sequence[Example], section: DataSection, joined: int, plain: bool) -> Tokens:
    """Rows within max_length, as `section.overlong` says."""
    most = section.max_length
    policy = section.overlong
    if policy == "auto":
        policy = "split" if isinstance(examples[0], Text) else "error"
    if policy == "split" and not isinstance(examples[0], Text):
        what = "`split` makes several rows of one, and only plain text can be divided anywhere"
        raise DataError("cannot shorten the data:", [Diagnostic("data.overlong", what, "use drop or truncate")])
    lengths = tuple(len(row["input_ids"]) for row in rows)
    if policy == "error":
        _refuse_overlong(lengths, examples, section)
    fitted: list[Row] = []
    sources: list[str] = []
    truncated = dropped = split = 0
    for example, row, length in zip(examples, rows, lengths, strict=True):
        if length <= most:
            fitted.append(row)
        elif policy == "split":
            split += 1
            parts = [{key: ids[i : i + most] for key, ids in row.items()} for i in range(0, length, most)]
            fitted += [part for part in parts if len(part["input_ids"]) > 1]  # one token alone predicts nothing
        elif policy == "truncate" and any(label != IGNORED for label in row["labels"][1:most]):
            truncated += 1
            fitted.append({key: ids[:most] for key, ids in row.items()})
        else:
            dropped += 1
        sources += [source_of(example.where)] * (len(fitted) - len(sources))
    return Tokens(tuple(fitted), lengths, truncated, dropped, split, joined, plain, tuple(sources))


def _refuse_overlong(lengths: Sequence[int], examples: Sequence[Example], section: DataSection) -> None:
    offenders = BadRows()
    for example, length in zip(examples, lengths, strict=True):
        if length > section.max_length:
            offenders.add(example.where, f"{length:,} tokens")
    if offenders.count:
        longest = max(lengths)
        fix = f"raise data.max_length to {longest}, or set data.overlong to drop or truncate"
        problems = [*offenders.shown]
        if offenders.count > len(problems):
            problems.append(Diagnostic("", f"and {offenders.count - len(problems):,} more"))
        count = f"{offenders.count:,} of {len(lengths):,} rows"
        what = f"{count} are longer than data.max_length ({section.max_length:,} tokens):"
        raise DataError(what, [*problems, Diagnostic("", f"the longest has {longest:,} tokens", fix)])


# --- DPO --------------------------------------------------------------------------------------------------------


def _preferences(examples: Sequence[Example], tokenizer: Any, section: DataSection) -> Tokens:
    rows: list[Row] = []
    offenders, joined, special = BadRows(), 0, encode.special_ids(tokenizer)
    for example in examples:
        assert isinstance(example, Preference)
        try:
            row, shares = encode.preference(tokenizer, example, special)
            rows.append(row)
            joined += shares
        except ValueError as error:
            offenders.add(example.where, str(error))
    offenders.refuse("the data", len(examples))
    most, answers = section.max_length, ("chosen_ids", "rejected_ids")
    lengths = tuple(len(row["prompt_ids"]) + max(len(row[key]) for key in answers) for row in rows)
    if section.overlong in ("auto", "error"):
        _refuse_overlong(lengths, examples, section)
    if section.overlong == "split":
        what = "`split` makes several rows of one, and only plain text can be divided anywhere"
        raise DataError("cannot shorten the data:", [Diagnostic("data.overlong", what, "use drop or truncate")])
    fitted: list[Row] = []
    sources: list[str] = []
    truncated = dropped = 0
    for example, row, length in zip(examples, rows, lengths, strict=True):
        room = most - len(row["prompt_ids"])
        if length <= most:
            fitted.append(row)
        elif section.overlong == "truncate" and room > 0:
            truncated += 1
            fitted.append(row | {key: row[key][:room] for key in answers})
        else:
            dropped += 1
        sources += [source_of(example.where)] * (len(fitted) - len(sources))
    return Tokens(tuple(fitted), lengths, truncated, dropped, 0, joined, sources=tuple(sources))
