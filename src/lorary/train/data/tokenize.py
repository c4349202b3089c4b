"""Examples as rows of token ids with labels: the trainer's input, and all that it sees of the data.

An answer ends with a token that is in the loss, and a row begins with at most one BOS. Both go wrong often and
silently, so `lorary.train.data.lint` checks them again on the finished rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.train.config.data_section import DataSection
from lorary.train.data import chat, encode, task_tokens
from lorary.train.data._records import BadRows, convert, source_of
from lorary.train.data.row_formats import Chat, Example, Pair, Preference, Text
from lorary.train.data.special_tokens import SpecialTokens
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
        sources: the source of every row.
        copies: number of rows that repeat another because of their source's weight.
        has_answers: whether the rows end with an answer to learn; prompts and labelled texts do not.
        streamed: whether these are only the first rows of a stream.
        notes: what a user should know of how the rows came to be.
    """

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    joined: int = 0
    plain: bool = False
    sources: tuple[str, ...] = ()
    copies: int = 0
    has_answers: bool = True
    streamed: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Encoded:
    """The rows of one example before they are shortened: one, or one per answer of a conversation."""

    example: Example
    rows: list[Row]
    joined: bool = False


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    section: DataSection,
    copies: Sequence[int] = (),
    sources: Sequence[str] = (),
    streamed: bool = False,
    labels: Labels | None = None,
) -> Tokens:
    """Rows of at most `section.max_length` tokens.

    Args:
        examples: as `lorary.train.data.load.load` returns them.
        tokenizer: a fast Transformers tokenizer; it gets the template that `section.chat_template` names.
        section: the `data` section of the configuration.
        copies: how often each example occurs; empty: once.
        sources: the source of each example; empty: its file or data set.
        streamed: whether these are only the first examples of a stream.
        labels: of a classification.

    Raises:
        DataError: a chat template is missing or refuses a row; rows are too long and may not be cut; plain text with
            `loss: completion`.
    """
    encoder = Encoder(tokenizer, section, examples, labels)
    encoded = convert(examples, encoder.encode, "the data")
    sources = sources or [source_of(example.where) for example in examples]
    fitted = _fitted(encoded, section, copies or [1] * len(encoded), sources)
    return replace(fitted, notes=encoder.notes(encoded), streamed=streamed)


class Encoder:
    """The token ids and labels of examples.

    Args:
        tokenizer: a fast Transformers tokenizer; it gets the template that `section.chat_template` names.
        section: the `data` section of the configuration.
        examples: the first ones, against which the section is checked.
        labels: of a classification.

    Raises:
        DataError: a chat template is missing, or plain text is to be trained with `loss: completion`.
    """

    def __init__(
        self, tokenizer: Any, section: DataSection, examples: Sequence[Example], labels: Labels | None = None
    ) -> None:
        chat.use_template(tokenizer, section.chat_template)
        if section.loss == "completion" and any(isinstance(example, Text) for example in examples):
            what = "`completion` trains on answers only, and plain text has none"
            problem = Diagnostic("data.loss", what, "use `all`, or rows with a prompt")
            raise DataError("cannot mask the data:", [problem])
        if (first := next(filter(_is_conversation, examples), None)) is not None:
            chat.require_template(tokenizer, first.where)
        self.everything = section.loss == "all"
        self.tokenizer, self.ends = tokenizer, encode.added_ids(tokenizer)
        self.special = SpecialTokens(tokenizer, section.special_tokens)
        self.separator, self.labels = section.separator, labels

    def encode(self, example: Example) -> _Encoded:
        """The rows of an example.

        Raises:
            ValueError: it cannot be rendered, or has special tokens that are refused.
        """
        tokenizer = self.special.tokenizer_for(example)
        if isinstance(example, Judged | Prompt | Labelled):
            return _Encoded(example, [task_tokens.encoded(example, tokenizer, self.ends, self.labels)])
        if isinstance(example, Preference):
            row, joined = encode.preference(tokenizer, example, self.ends)
            return _Encoded(example, [row], joined)
        joined = False
        if isinstance(example, Chat):
            answers = chat.encode(tokenizer, example)
            masked = [encode.end_answers(*answer, tokenizer, self.ends) for answer in answers]
        elif isinstance(example, Pair):
            ids, start, joined = encode.pair(tokenizer, example.prompt, example.completion)
            masked = [(ids, [i >= start for i in range(len(ids))])]
        else:
            ids = encode.with_eos(encode.encode_text(tokenizer, example.text), tokenizer)
            masked = [(ids, [True] * len(ids))]
        return _Encoded(example, [self._labelled(*each) for each in masked], joined)

    def _labelled(self, ids: list[int], mask: list[bool]) -> Row:
        labels = [i if self.everything or learn else IGNORED for i, learn in zip(ids, mask, strict=True)]
        return {"input_ids": ids, "labels": labels}

    def notes(self, encoded: Sequence[_Encoded]) -> tuple[str, ...]:
        """What a user should know of the examples."""
        return (*_turn_notes(encoded), *self._boundary_notes(encoded), *self.special.notes)

    def _boundary_notes(self, encoded: Sequence[_Encoded]) -> list[str]:
        """The prompts that run into their answers without white space."""
        pairs = [each.example for each in encoded if isinstance(each.example, Pair)]
        glued = [pair for pair in pairs if is_glued(pair)]
        if not glued or self.separator is not None:
            return []
        shown = f"{glued[0].prompt[-12:]!r} + {glued[0].completion[:12]!r}"
        of, fix = f"{len(glued):,} of {len(pairs):,}", 'data.separator: "\\n" (or " ") puts one before every completion'
        return [f"{of} prompts run into their completion without white space ({shown}, {glued[0].where}); {fix}"]


def _is_conversation(example: Example) -> bool:
    return isinstance(example, Chat) or not isinstance(getattr(example, "prompt", ""), str)


def is_glued(pair: Pair) -> bool:
    """Whether two words of prompt and completion touch; writing without spaces between words does so everywhere."""
    last, first = pair.prompt[-1:], pair.completion[:1]
    return bool(last) and last.isascii() and first.isascii() and not last.isspace() and not first.isspace()


def _turn_notes(encoded: Sequence[_Encoded]) -> list[str]:
    several = [each for each in encoded if len(each.rows) > 1]
    if not several:
        return []
    rows = sum(len(each.rows) for each in several)
    why = "the chat template renders earlier answers differently, such as without their reasoning"
    return [f"{len(several):,} conversations became {rows:,} rows, one per answer: {why}"]


def _fitted(encoded: Sequence[_Encoded], section: DataSection, copies: Sequence[int], sources: Sequence[str]) -> Tokens:
    """The rows within max_length, as `section.overlong` says."""
    most = section.max_length
    flat = [(each.example, row) for each in encoded for row in each.rows]
    if section.overlong == "split" and not all(isinstance(example, Text) for example, _ in flat):
        what = "`split` makes several rows of one, which only plain text allows"
        raise DataError("cannot shorten the data:", [Diagnostic("data.overlong", what, "use drop or truncate")])
    lengths = tuple(_length(row) for _, row in flat)
    policies = [policy(section, example) for example, _ in flat]
    strict = [i for i, chosen in enumerate(policies) if chosen == "error"]
    _refuse_overlong([lengths[i] for i in strict], [flat[i][0] for i in strict], most)
    kept = [fitting(row, chosen, most) for (_, row), chosen in zip(flat, policies, strict=True)]
    lost = [bool(parts) and length > most for parts, length in zip(kept, lengths, strict=True)]
    times = [count for each, count in zip(encoded, copies, strict=True) for _ in each.rows]
    origins = [source for each, source in zip(encoded, sources, strict=True) for _ in each.rows]
    return Tokens(
        rows=tuple(row for parts, count in zip(kept, times, strict=True) for _ in range(count) for row in parts),
        lengths=lengths,
        truncated=sum(cut and chosen == "truncate" for cut, chosen in zip(lost, policies, strict=True)),
        dropped=sum(not parts for parts in kept),
        split=sum(cut and chosen == "split" for cut, chosen in zip(lost, policies, strict=True)),
        joined=sum(each.joined for each in encoded),
        plain=section.loss == "all" or all(isinstance(each.example, Text | Labelled) for each in encoded),
        has_answers=not any(isinstance(each.example, Prompt | Labelled) for each in encoded),
        sources=tuple(o for parts, n, o in zip(kept, times, origins, strict=True) for _ in range(n * len(parts))),
        copies=sum(len(parts) * (count - 1) for parts, count in zip(kept, times, strict=True)),
    )


def policy(section: DataSection, example: Example) -> str:
    """What happens to an example that is longer than `section.max_length`."""
    if section.overlong != "auto":
        return section.overlong
    return "split" if isinstance(example, Text) else "error"


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


def fitting(row: Row, policy: str, most: int) -> list[Row]:
    """A row if it has at most `most` tokens, or else the rows that replace it; none if it is dropped."""
    if _length(row) <= most:
        return [row]
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
