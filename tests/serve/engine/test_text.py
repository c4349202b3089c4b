"""The text of tokens as they come: whole characters, stop strings wherever they fall."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from lorary import builtin
from lorary.serve.engine.text import TextStream


class Pieces:
    """A tokenizer whose token i is the piece i: bytes, which may be parts of characters."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = list(pieces)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def streamed(pieces: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What is given out after each piece, and at the end."""
    stream, given = TextStream(Pieces(pieces), [], stops), []
    for i in range(len(pieces)):
        given.append(stream.push(i))
        if stream.stop is not None:
            return given, stream
    return [*given, stream.rest()], stream


def cut(text: bytes, rng: random.Random) -> list[bytes]:
    places = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 12)))})
    return [text[a:b] for a, b in itertools.pairwise(places)]


TEXT = "naïve 日本語 \N{GRINNING FACE}\N{MAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER} end"


def test_characters_are_given_whole() -> None:
    rng = random.Random(0)
    for _ in range(300):
        given, _ = streamed(cut(TEXT.encode(), rng))
        assert "".join(given) == TEXT
        assert all("\ufffd" not in part for part in given)


def test_bytes_that_are_no_character_are_given_in_the_end() -> None:
    given, _ = streamed([b"a", b"\xff", b"\xe6\x97"])
    assert "".join(given) == "a\ufffd\ufffd"
    assert given[:2] == ["a", ""]
    held, _ = streamed([b"\xff"] * 40)
    assert "".join(held) == "\ufffd" * 40
    assert any(held[:-1]), "nothing is held back for ever"


def stopped(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """By definition: character after character, up to the first stop string, the longest if several end there."""
    for end in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:end].endswith(stop)]
        if ends:
            longest = max(ends, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_stop_strings_are_found_wherever_tokens_end() -> None:
    rng = random.Random(1)
    for _ in range(1500):
        text = "".join(rng.choices("abé", k=rng.randrange(1, 14)))
        stops = ["".join(rng.choices("abé", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        given, stream = streamed(cut(text.encode(), rng) or [b""], stops)
        assert ("".join(given), stream.stop) == stopped(text, stops), (text, stops)
        assert stream.rest() == ""


def test_what_cannot_begin_a_stop_string_is_given_at_once() -> None:
    given, stream = streamed([b"one", b" <", b"b>", b" two <", b"end", b"> rest"], ["<end>"])
    assert given == ["one", " ", "<b>", " two ", "", ""]
    assert stream.stop == "<end>"


def test_a_stop_string_may_be_found_in_the_rest() -> None:
    stream = TextStream(Pieces([b"x\xff"]), [], ["\ufffd"])
    assert stream.push(0) == ""
    assert (stream.rest(), stream.stop) == ("x", "\ufffd")


@pytest.mark.parametrize("prompt", ["", "def f(x):\n    return", "日"])
def test_text_goes_on_after_the_prompt(prompt: str) -> None:
    tokenizer = builtin.load_tokenizer()
    ids = tokenizer(prompt)["input_ids"]
    text = " naïve 日本 = 1\n\n\tend"
    stream = TextStream(tokenizer, ids)
    assert "".join(stream.push(i) for i in tokenizer(text)["input_ids"]) + stream.rest() == text
