"""Lint of the tokenized rows before the first step: statistics, problems, notes and a sample.

Problems stop a run, notes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorary.errors import DataError, Diagnostic
from lorary.train.data.encode import added_ids, decode
from lorary.train.data.tokenize import IGNORED, Row, Tokens, token_ids

if TYPE_CHECKING:
    from rich.text import Text

PERCENTILES = (50, 90, 99, 100)
Pieces = tuple[tuple[str, bool], ...]  # runs of a row's text, and whether each is labelled
Flat = tuple[list[int], list[int]]  # ids and labels


@dataclass(frozen=True)
class Lint:
    """The findings on the rows of a run.

    Args:
        rows: number of training rows.
        held_out: number of held-out rows.
        lengths: percentile -> tokens of an example, before truncation.
        truncated: share of the examples that lost tokens or were left out for their length.
        labelled: share of the tokens that have a label, and so are in the loss.
        notes: what a user should know.
        problems: what must be fixed first.
        sample: the first row, as text.
        has_answers: whether the rows hold answers to learn; prompts and labelled texts do not.
        sources: (source, its rows, their tokens) of the training rows.
        streamed: whether only the first rows of a stream were checked.
    """

    rows: int
    held_out: int
    lengths: dict[int, int]
    truncated: float
    labelled: float
    notes: tuple[str, ...]
    problems: tuple[Diagnostic, ...]
    sample: Pieces
    has_answers: bool = True
    sources: tuple[tuple[str, int, int], ...] = ()
    streamed: bool = False

    def refuse(self) -> None:
        """Raise if there is a problem.

        Raises:
            DataError: every problem at once.
        """
        if self.problems:
            raise DataError("the training data has errors:", self.problems)


def lint(tokens: Tokens, tokenizer: Any, vocabulary: int, held_out: Tokens | None = None) -> Lint:
    """The lint of the rows of a run.

    Args:
        tokens: the training rows.
        tokenizer: their tokenizer.
        vocabulary: rows of the model's embedding; every id must be below.
        held_out: the held-out rows.
    """
    rows = [_flat(row) for row in tokens.rows]
    others = [_flat(row) for row in held_out.rows] if held_out else []
    total = sum(len(ids) for ids, _ in rows)
    labelled = sum(label != IGNORED for _, labels in rows for label in labels) / max(total, 1)
    ends, end_notes = _ends(tokens, rows, tokenizer)
    problems = (
        *_labels(tokens, rows, labelled),
        *_no_held_out(held_out),
        *_vocabulary(rows + others, vocabulary, tokenizer),
        *_double_bos(rows, tokenizer),
        *ends,
    )
    notes = [*_lengths(tokens), *_missing_bos(tokens, rows, tokenizer), *end_notes]
    notes += [*_repeats(tokens, rows, others), *tokens.notes]
    notes += [f"held out: {note}" for note in (held_out.notes if held_out else ())]
    if tokenizer.pad_token_id is None:
        notes.append("the tokenizer has no padding token: EOS pads instead")
    return Lint(
        rows=len(rows),
        held_out=len(others),
        lengths=percentiles(tokens.lengths),
        truncated=(tokens.truncated + tokens.dropped) / max(len(tokens.lengths), 1),
        labelled=labelled,
        notes=tuple(notes),
        problems=problems,
        sample=pieces(*rows[0], tokenizer) if rows else (),
        has_answers=tokens.has_answers,
        sources=_sources(tokens.sources, rows),
        streamed=tokens.streamed,
    )


def _sources(names: Sequence[str], rows: list[Flat]) -> tuple[tuple[str, int, int], ...]:
    """(source, its rows, their tokens), in the order of the sources."""
    counts: dict[str, tuple[int, int]] = {}
    for name, (ids, _) in zip(names, rows, strict=False):
        count, tokens = counts.get(name, (0, 0))
        counts[name] = count + 1, tokens + len(ids)
    return tuple((name, *count) for name, count in counts.items())


def percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Percentile -> the smallest length that at least so many percent of the examples do not exceed."""
    ordered = sorted(lengths)
    return {p: ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES} if ordered else {}


def _flat(row: Row) -> Flat:
    """The ids and labels of a row, or of its prompt and its first or only answer."""
    ids = token_ids(row)
    if "prompt_ids" in row:
        return ids, [IGNORED] * len(row["prompt_ids"]) + ids[len(row["prompt_ids"]) :]
    return ids, row.get("labels", [IGNORED] * len(ids))


def _labels(tokens: Tokens, rows: list[Flat], labelled: float) -> list[Diagnostic]:
    if not rows:
        what = f"no row is left: {tokens.dropped:,} of {len(tokens.lengths):,} are longer than data.max_length"
        return [Diagnostic("", what, "raise data.max_length")]
    if not tokens.has_answers:
        return []
    # the first token of a row has nothing to be predicted from, so its label does not count
    silent = sum(all(label == IGNORED for label in labels[1:]) for _, labels in rows)
    if silent == len(rows):
        return [Diagnostic("", "no token has a label (0 % labelled)", "look at the sample: the mask covers everything")]
    problems = []
    if silent:
        problems.append(Diagnostic("", f"{silent:,} of {len(rows):,} rows have no labelled token"))
    if labelled == 1.0 and not tokens.plain:
        what = "every token has a label (100 % labelled), prompts included"
        problems.append(Diagnostic("", what, "look at the sample; set data.loss: all if that is what you want"))
    return problems


def _no_held_out(held_out: Tokens | None) -> list[Diagnostic]:
    """Held-out rows that are all gone: nothing would be evaluated."""
    if held_out is None or held_out.rows:
        return []
    what = f"no held-out row is left: {held_out.dropped:,} of {len(held_out.lengths):,} are longer than data.max_length"
    return [Diagnostic("", what, "raise data.max_length")]


def _vocabulary(rows: list[Flat], vocabulary: int, tokenizer: Any) -> list[Diagnostic]:
    highest = max((max(ids) for ids, _ in rows if ids), default=-1)
    if highest < vocabulary:
        return []
    token = tokenizer.convert_ids_to_tokens(highest)
    what = f"token {highest} ({token!r}), but the model has {vocabulary:,} embeddings"
    return [Diagnostic("", what, "the tokenizer is another model's, or the embedding was not resized")]


def _double_bos(rows: list[Flat], tokenizer: Any) -> list[Diagnostic]:
    bos = tokenizer.bos_token_id
    twice = sum(ids.count(bos) > 1 for ids, _ in rows)
    if bos is None or bos == tokenizer.eos_token_id or not twice:
        return []
    what = f"{twice:,} of {len(rows):,} rows have more than one BOS ({tokenizer.bos_token!r})"
    return [Diagnostic("", what, "the text or the chat template writes one that the tokenizer adds as well")]


def _missing_bos(tokens: Tokens, rows: list[Flat], tokenizer: Any) -> list[str]:
    """Rows without the BOS that the tokenizer would add: chat templates often forget it."""
    bos = tokenizer.bos_token_id
    without = sum(ids[:1] != [bos] for ids, _ in rows)
    if bos is None or tokens.split or not without or tokenizer("a")["input_ids"][:1] != [bos]:
        return []
    return [f"{without:,} of {len(rows):,} rows begin without the BOS that this tokenizer adds"]


def _ends(tokens: Tokens, rows: list[Flat], tokenizer: Any) -> tuple[list[Diagnostic], list[str]]:
    """Whether the end of an answer has a label, so that the model learns to stop."""
    if not tokens.has_answers:
        return [], []
    if tokenizer.eos_token_id is None:
        return [], ["the tokenizer has no EOS: the model will not learn to stop"]
    last = {next((i for i in reversed(labels) if i != IGNORED), None) for _, labels in rows}
    ends = added_ids(tokenizer).keys() & last
    if not ends and rows and not tokens.truncated and not tokens.split:
        what = f"no answer ends with a labelled token: EOS ({tokenizer.eos_token!r}) is masked everywhere"
        return [Diagnostic("", what, "the model would never stop; look at the sample")], []
    if others := sorted(ends - {tokenizer.eos_token_id}):
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in others)
        return [], [f"answers end with {names}, not with EOS ({tokenizer.eos_token!r}): generation must stop there"]
    return [], []


def _lengths(tokens: Tokens) -> list[str]:
    of = f"of {len(tokens.lengths):,}"
    notes = {
        f"{tokens.truncated:,} {of} examples are truncated, and lose their end": tokens.truncated,
        f"{tokens.dropped:,} {of} examples are left out for their length": tokens.dropped,
        f"{tokens.split:,} {of} texts are split into several rows": tokens.split,
        f"{tokens.joined:,} prompts end inside a token of the answer: end prompts at a word's end": tokens.joined,
    }
    return [note for note, count in notes.items() if count]


def _repeats(tokens: Tokens, rows: list[Flat], others: list[Flat]) -> list[str]:
    """Rows that occur more than once, and held-out rows that are also in the training data."""
    unique, notes = {tuple(ids) for ids, _ in rows}, []
    repeated = len(rows) - len(unique) - tokens.copies  # a weight's own copies are meant, as are a stream's passes
    if repeated and not tokens.streamed:
        notes.append(f"{repeated:,} of {len(rows):,} rows repeat another")
    if overlap := sum(tuple(ids) in unique for ids, _ in others):
        notes.append(f"{overlap:,} of {len(others):,} held-out rows are also trained on: their loss means nothing")
    return notes


# --- showing ----------------------------------------------------------------------------------------------------


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any, most: int = 400) -> Pieces:
    """The text of a row's first `most` tokens, in runs with and without labels."""
    tokens = list(zip(ids, labels, strict=True))[:most]
    runs = groupby(tokens, key=lambda token: token[1] != IGNORED)
    return tuple((decode(tokenizer, [i for i, _ in run]), labelled) for labelled, run in runs)


def summary(lint: Lint) -> list[str]:
    """The statistics, notes and problems, one line each."""
    lengths = ", ".join(f"{p} % up to {n:,}" for p, n in lint.lengths.items())
    what = "of a stream checked" if lint.streamed else "to train on"
    return [
        f"rows      {lint.rows:,} {what}, {lint.held_out:,} held out",
        f"tokens    per row: {lengths}; {lint.truncated:.1%} of the rows cut",
        *([f"labelled  {lint.labelled:.1%} of the tokens"] if lint.has_answers else []),
        *_source_lines(lint),
        *(f"note      {note}" for note in lint.notes),
        *(f"problem   {problem}" for problem in lint.problems),
    ]


def _source_lines(lint: Lint) -> list[str]:
    """One line for each of several sources."""
    total = max(sum(tokens for _, _, tokens in lint.sources), 1)
    several = lint.sources if len(lint.sources) > 1 else ()
    return [f"source    {name}: {rows:,} rows, {n:,} tokens ({n / total:.1%})" for name, rows, n in several]


def text(lint: Lint) -> str:
    """The lint as plain text, with [[ ]] around labelled tokens."""
    sample = "".join(f"[[{piece}]]" if labelled else piece for piece, labelled in lint.sample)
    head = "sample    [[labelled]], the rest is context" if lint.has_answers else "sample"
    return "\n".join([*summary(lint), head, sample])


def rich_text(lint: Lint) -> Text:
    """The lint for a terminal; labelled tokens are green, and underlined for those who do not see green."""
    from rich.text import Text

    shown = Text("\n".join([*summary(lint), ""]))
    shown.append("sample    ")
    if lint.has_answers:
        shown.append("labelled", "underline green").append(", the rest is context")
    shown.append("\n")
    for piece, labelled in lint.sample:
        shown.append(piece, "underline green" if labelled else "dim")
    return shown
