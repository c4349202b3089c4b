"""The lint: its counts, refusals and display."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from lorary.errors import DataError
from lorary.train.data.lint import Lint, lint, percentiles, pieces, rich_text, text
from lorary.train.data.tokenize import Row, Tokens
from tests.train.small import tokenizer

USING = tokenizer()
BOS, EOS = 0, 1


def row(ids: list[int], labelled: int) -> Row:
    """A row whose last `labelled` tokens have labels."""
    return {"input_ids": ids, "labels": [-100] * (len(ids) - labelled) + ids[len(ids) - labelled :]}


GOOD = row([BOS, 30, 31, 32, EOS], 3)


def judge(*rows: Row, using: Any = USING, vocabulary: int = 300, held_out: tuple[Row, ...] = (), **fields: Any) -> Lint:
    lengths = tuple(len(r.get("input_ids", [])) for r in rows)
    others = Tokens(held_out, ()) if held_out else None
    return lint(Tokens(rows, **{"lengths": lengths, **fields}), using, vocabulary, others)


def refused(found: Lint) -> str:
    with pytest.raises(DataError) as error:
        found.refuse()
    return str(error.value).split("\n", 1)[1]


def test_good_rows_pass_with_their_numbers() -> None:
    found = judge(GOOD, row([BOS, 40, EOS], 1), held_out=(row([BOS, 50, EOS], 1),))
    found.refuse()
    assert (found.rows, found.held_out, found.labelled, found.truncated) == (2, 1, 4 / 8, 0.0)
    assert found.lengths == {50: 3, 90: 5, 99: 5, 100: 5}
    assert (found.notes, found.problems) == ((), ())


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], {}), ([7], {50: 7, 90: 7, 99: 7, 100: 7}), (list(range(1, 101)), {50: 50, 90: 90, 99: 99, 100: 100})],
)
def test_percentiles_are_lengths_that_occur(lengths: list[int], expected: dict[int, int]) -> None:
    assert percentiles(lengths[::-1]) == expected


def test_rows_without_labels_are_refused() -> None:
    only_first = {"input_ids": [30, 31, EOS], "labels": [30, -100, -100]}  # predicted from nothing
    for silent in (row([BOS, 30, EOS], 0), only_first):
        assert refused(judge(silent)) == (
            "  - no token has a label (0 % labelled)\n      hint: look at the sample: the mask covers everything\n"
            "  - no answer ends with a labelled token: EOS ('</s>') is masked everywhere\n"
            "      hint: the model would never stop; look at the sample"
        )


def test_some_silent_rows_are_refused_with_their_number() -> None:
    assert refused(judge(GOOD, row([BOS, 30, EOS], 0))) == "  - 1 of 2 rows have no labelled token"


def test_fully_labelled_rows_are_refused_unless_the_data_is_plain() -> None:
    whole = row([BOS, 30, 31, EOS], 4)
    assert "every token has a label (100 % labelled), prompts included" in refused(judge(whole))
    judge(whole, plain=True).refuse()


def test_a_masked_end_is_refused() -> None:
    endless = {"input_ids": [BOS, 30, 31, EOS], "labels": [-100, -100, 31, -100]}
    assert refused(judge(endless, endless)) == (
        "  - no answer ends with a labelled token: EOS ('</s>') is masked everywhere\n"
        "      hint: the model would never stop; look at the sample"
    )
    judge(endless, truncated=1).refuse()  # the end was cut off, which has its own note


def test_another_end_is_worth_a_note() -> None:
    using = tokenizer(extra=("<|end|>",))
    ended = {"input_ids": [BOS, 30, 31, 2], "labels": [-100, -100, 31, 2]}
    assert judge(ended, using=using).notes == (
        "answers end with '<|end|>', not with EOS ('</s>'): generation must stop there",
    )


def test_two_beginnings_are_refused() -> None:
    assert refused(judge(GOOD, row([BOS, BOS, 30, EOS], 2))) == (
        "  - 1 of 2 rows have more than one BOS ('<s>')\n"
        "      hint: the text or the chat template writes one that the tokenizer adds as well"
    )


def test_a_missing_bos_is_worth_a_note_if_the_tokenizer_adds_one() -> None:
    bare = row([30, 31, EOS], 2)
    assert judge(GOOD, bare).notes == ("1 of 2 rows begin without the BOS that this tokenizer adds",)
    assert judge(GOOD, bare, using=tokenizer(bos=False)).notes == ()
    assert judge(GOOD, bare, split=1).notes == ("1 of 2 texts are split into several rows",)


def test_a_bos_that_is_also_the_eos_may_occur_twice() -> None:
    using = tokenizer(bos=False)
    using.bos_token = using.eos_token
    judge(row([EOS, 30, EOS], 2), using=using).refuse()


def test_tokens_beyond_the_embedding_are_refused_also_in_held_out_rows() -> None:
    expected = (
        f"  - token 260 ({USING.convert_ids_to_tokens(260)!r}), but the model has 260 embeddings\n"
        "      hint: the tokenizer is another model's, or the embedding was not resized"
    )
    beyond = row([BOS, 30, 260, EOS], 2)
    assert refused(judge(beyond, vocabulary=260)) == expected
    assert refused(judge(GOOD, held_out=(beyond,), vocabulary=260)) == expected
    judge(beyond, vocabulary=261).refuse()


def test_repeats_and_overlap_are_counted() -> None:
    notes = judge(GOOD, GOOD, row([BOS, 40, EOS], 1), held_out=(GOOD, row([BOS, 50, EOS], 1))).notes
    assert notes == (
        "1 of 3 rows repeat another",
        "1 of 2 held-out rows are also trained on: their loss means nothing",
    )


def test_what_was_cut_is_counted() -> None:
    found = judge(GOOD, lengths=(5, 50, 60, 70), truncated=1, dropped=2, split=3, joined=4)
    assert found.truncated == 3 / 4
    assert found.notes == (
        "1 of 4 examples are truncated, and lose their end",
        "2 of 4 examples are left out for their length",
        "3 of 4 texts are split into several rows",
        "4 prompts end inside a token of the answer: end prompts at a word's end",
    )


def test_preference_pairs_are_judged_by_their_better_answer() -> None:
    pair = {"prompt_ids": [BOS, 30], "chosen_ids": [31, EOS], "rejected_ids": [32, EOS]}
    found = judge(pair)
    found.refuse()
    assert found.labelled == 0.5


def test_all_problems_come_at_once() -> None:
    assert len(judge(row([BOS, BOS, 299, 30], 0), vocabulary=200).problems) == 4


# --- showing ----------------------------------------------------------------------------------------------------


def sample() -> Lint:
    ids = USING("hello the answer")["input_ids"]
    return judge({"input_ids": [*ids, EOS], "labels": [*[-100] * 2, *ids[2:], EOS]})


def test_the_sample_is_the_text_in_runs() -> None:
    assert sample().sample == (("<s>hello", False), (" the answer</s>", True))


def test_a_long_sample_is_cut() -> None:
    shown = pieces([30] * 50, [-100] * 10 + [30] * 40, USING, most=20)
    assert [(len(piece), labelled) for piece, labelled in shown] == [(10, False), (10, True)]


def test_plain_text_marks_labelled_tokens() -> None:
    assert text(sample()) == (
        "rows      1 to train on, 0 held out\n"
        "tokens    per row: 50 % up to 5, 90 % up to 5, 99 % up to 5, 100 % up to 5; 0.0% of the rows cut\n"
        "labelled  60.0% of the tokens\n"
        "sample    [[labelled]], the rest is context\n"
        "<s>hello[[ the answer</s>]]"
    )


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_underlines_labelled_tokens_and_a_pipe_gets_no_colour(width: int) -> None:
    coloured, plain = (
        Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None)
        for terminal in (True, False)
    )
    for console in (coloured, plain):
        console.print(rich_text(sample()), end="")
    assert "\x1b[4;32m the answer</s>\x1b[0m" in coloured.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in plain.file.getvalue()  # type: ignore[attr-defined]
    assert "<s>hello the answer</s>" in plain.file.getvalue()  # type: ignore[attr-defined]
