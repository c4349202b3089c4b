"""What is wrong with the finished rows, before the first step: counted, judged, and shown.

`lint` gives a value; `text` and `rich_text` show it. Problems stop a run, notes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorary.errors import DataError, Diagnostic
from lorary.train.data.encode import special_ids
from lorary.train.data.tokenize import IGNORED, Row, Tokens

if TYPE_CHECKING:
    from rich.text import Text

PERCENTILES = (50, 90, 99, 100)
Pieces = tuple[tuple[str, bool], ...]  # stretches of a row's text, and whether each is learnt


@dataclass(frozen=True)
class Lint:
    """What the rows are like.

    Args:
        rows: how many there are to learn from.
        held_out: how many are held out.
        lengths: percentile -> tokens of an example, before any was cut.
        truncated: share of the examples that lost tokens or were left out for their length.
        labelled: share of the tokens that are learnt.
        notes: what is worth knowing.
        problems: what must be mended first.
        sample: the first row, as text.
    """

    rows: int
    held_out: int
    lengths: dict[int, int]
    truncated: float
    labelled: float
    notes: tuple[str, ...]
    problems: tuple[Diagnostic, ...]
    sample: Pieces

    def refuse(self) -> None:
        """Stop here where there is a problem.

        Raises:
            DataError: every problem at once.
        """
        if self.problems:
            raise DataError("the training data has errors:", self.problems)


def lint(tokens: Tokens, tokenizer: Any, vocabulary: int, held_out: Tokens | None = None) -> Lint:
    """Judge the rows of a run.

    Args:
        tokens: the rows that are learnt.
        tokenizer: what made them.
        vocabulary: rows of the model's embedding: ids from here on would be out of range.
        held_out: the rows that are held out.
    """
    rows = [_flat(row) for row in tokens.rows]
    others = [_flat(row) for row in held_out.rows] if held_out else []
    learnt = sum(label != IGNORED for _, labels in rows for label in labels)
    total = sum(len(ids) for ids, _ in rows)
    labelled = learnt / total if total else 0.0
    found = [
        *_emptiness(tokens, rows, labelled),
        *_vocabulary(rows + others, vocabulary, tokenizer),
        *_starts(rows, tokenizer),
    ]
    ends, end_notes = _ends(tokens, rows, tokenizer)
    cut = (tokens.truncated + tokens.dropped) / max(len(tokens.lengths), 1)
    notes = [
        *_lengths(tokens),
        *_missing_starts(tokens, rows, tokenizer),
        *end_notes,
        *_repeats(rows, others),
        *_padding(tokenizer),
    ]
    return Lint(
        rows=len(rows),
        held_out=len(others),
        lengths=percentiles(tokens.lengths),
        truncated=cut,
        labelled=labelled,
        notes=tuple(notes),
        problems=tuple(found + ends),
        sample=pieces(*rows[0], tokenizer) if rows else (),
    )


def percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Percentile -> the smallest length that at least so many percent of the examples do not exceed."""
    ordered = sorted(lengths)
    return {p: ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES} if ordered else {}


Flat = tuple[list[int], list[int]]  # ids and labels


def _flat(row: Row) -> Flat:
    """A row of SFT as it is, a preference pair as its prompt and better answer."""
    if "input_ids" in row:
        return row["input_ids"], row["labels"]
    ids = row["prompt_ids"] + row["chosen_ids"]
    return ids, [IGNORED] * len(row["prompt_ids"]) + row["chosen_ids"]


def _emptiness(tokens: Tokens, rows: list[Flat], labelled: float) -> list[Diagnostic]:
    if not rows:
        what = f"no row is left: {tokens.dropped:,} of {len(tokens.lengths):,} are longer than data.max_length"
        return [Diagnostic("", what, "raise data.max_length")]
    # the first token of a row is predicted from nothing, so a label there teaches nothing
    silent = sum(all(label == IGNORED for label in labels[1:]) for _, labels in rows)
    if silent == len(rows):
        return [Diagnostic("", "no token is learnt (0 % labelled)", "look at the sample: the mask covers everything")]
    problems = []
    if silent:
        problems.append(Diagnostic("", f"{silent:,} of {len(rows):,} rows have no token that is learnt"))
    if labelled == 1.0 and not tokens.plain:
        what = "every token is learnt (100 % labelled), prompts included"
        problems.append(Diagnostic("", what, "look at the sample; set data.loss: all if that is what you want"))
    return problems


def _vocabulary(rows: list[Flat], vocabulary: int, tokenizer: Any) -> list[Diagnostic]:
    highest = max((max(ids) for ids, _ in rows if ids), default=-1)
    if highest < vocabulary:
        return []
    what = (
        f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), but the model has {vocabulary:,} embeddings"
    )
    return [Diagnostic("", what, "the tokenizer is another model's, or the embedding was not resized")]


def _starts(rows: list[Flat], tokenizer: Any) -> list[Diagnostic]:
    """More than one BOS."""
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return []
    twice = sum(ids.count(bos) > 1 for ids, _ in rows)
    if not twice:
        return []
    what = f"{twice:,} of {len(rows):,} rows hold more than one BOS ({tokenizer.bos_token!r})"
    return [Diagnostic("", what, "the text or the chat template writes one that the tokenizer adds as well")]


def _missing_starts(tokens: Tokens, rows: list[Flat], tokenizer: Any) -> list[str]:
    """Rows without the BOS that the tokenizer would put: chat templates leave it out by mistake."""
    bos = tokenizer.bos_token_id
    if bos is None or tokens.split or tokenizer("a")["input_ids"][:1] != [bos]:
        return []
    without = sum(ids[:1] != [bos] for ids, _ in rows)
    return [f"{without:,} of {len(rows):,} rows begin without the BOS that this tokenizer puts"] if without else []


def _ends(tokens: Tokens, rows: list[Flat], tokenizer: Any) -> tuple[list[Diagnostic], list[str]]:
    """Whether the end of an answer is learnt, so that the model will stop."""
    if tokenizer.eos_token_id is None:
        return [], ["the tokenizer has no EOS: the model will not learn to stop"]
    special = special_ids(tokenizer)
    ends = [next((i for i in reversed(labels) if i != IGNORED), None) for _, labels in rows]
    ended = sum(end in special for end in ends if end is not None)
    if not ended and rows and not tokens.truncated and not tokens.split:
        what = f"no answer ends with a token that is learnt: EOS ({tokenizer.eos_token!r}) is masked everywhere"
        return [Diagnostic("", what, "the model would never stop; look at the sample")], []
    others = sorted({end for end in ends if end in special and end != tokenizer.eos_token_id and end is not None})
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in others)
    if others:
        return [], [f"answers end with {names}, not with EOS ({tokenizer.eos_token!r}): generation must stop there"]
    return [], []


def _lengths(tokens: Tokens) -> list[str]:
    notes, count = [], len(tokens.lengths)
    if tokens.truncated:
        notes.append(f"{tokens.truncated:,} of {count:,} examples are truncated, and lose their end")
    if tokens.dropped:
        notes.append(f"{tokens.dropped:,} of {count:,} examples are left out for their length")
    if tokens.split:
        notes.append(f"{tokens.split:,} of {count:,} texts are divided into several rows")
    if tokens.joined:
        notes.append(f"{tokens.joined:,} prompts end inside a token of the answer: end prompts at a word's end")
    return notes


def _repeats(rows: list[Flat], others: list[Flat]) -> list[str]:
    """Rows that occur more than once, and held-out rows that are learnt."""
    seen = [tuple(ids) for ids, _ in rows]
    unique, notes = set(seen), []
    if len(unique) < len(seen):
        notes.append(f"{len(seen) - len(unique):,} of {len(seen):,} rows repeat another")
    overlap = sum(tuple(ids) in unique for ids, _ in others)
    if overlap:
        notes.append(f"{overlap:,} of {len(others):,} held-out rows are learnt as well: their loss means nothing")
    return notes


def _padding(tokenizer: Any) -> list[str]:
    return [] if tokenizer.pad_token_id is not None else ["the tokenizer has no padding token: EOS pads instead"]


# --- showing ----------------------------------------------------------------------------------------------------


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any, most: int = 400) -> Pieces:
    """The text of a row's first `most` tokens in stretches that are learnt, or not."""
    found: list[tuple[str, bool]] = []
    start = 0
    for i in range(1, min(len(ids), most) + 1):
        learnt = labels[start] != IGNORED
        if i == min(len(ids), most) or (labels[i] != IGNORED) != learnt:
            found.append((tokenizer.decode(ids[start:i], clean_up_tokenization_spaces=False), learnt))
            start = i
    return tuple(found)


def summary(lint: Lint) -> list[str]:
    """The numbers and notes, a line each."""
    lengths = ", ".join(f"{p} %: {n:,}" for p, n in lint.lengths.items())
    return [
        f"rows      {lint.rows:,} to learn from, {lint.held_out:,} held out",
        f"tokens    of a row at most, for {lengths}; {lint.truncated:.1%} of the rows cut",
        f"learnt    {lint.labelled:.1%} of the tokens",
        *(f"note      {note}" for note in lint.notes),
        *(f"problem   {problem}" for problem in lint.problems),
    ]


def text(lint: Lint) -> str:
    """The whole as plain text: [[ ]] stand around what is learnt."""
    sample = "".join(f"[[{piece}]]" if learnt else piece for piece, learnt in lint.sample)
    return "\n".join([*summary(lint), "sample    [[learnt]], the rest is only read", sample])


def rich_text(lint: Lint) -> Text:
    """The whole for a terminal: what is learnt is green, and underlined for whoever does not see green."""
    from rich.text import Text

    shown = Text("\n".join([*summary(lint), ""]))
    shown.append("sample    ").append("learnt", "underline green").append(", the rest is only read\n")
    for piece, learnt in lint.sample:
        shown.append(piece, "underline green" if learnt else "dim")
    return shown
