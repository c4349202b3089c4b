"""Patterns from a stranger: the answers of Python's own matcher, in bounded time."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest

from lorary.formats.patterns import Budget, Pattern
from lorary.formats.tails import Tail

PIECES = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "[a-b1]", r"\w", r"\W", "_", "^", "$", r"\b", r"\B", r"\S"]
QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}"]


def expression(rng: random.Random, depth: int) -> str:
    """A random regular expression."""
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(PIECES)

    def inner() -> str:
        return expression(rng, depth - 1)

    if kind < 0.5:
        return inner() + inner()
    if kind < 0.62:
        return f"(?:{inner()}|{inner()})"
    if kind < 0.7:
        return f"({inner()})"
    if kind < 0.9:
        return f"(?:{inner()}){rng.choice(QUANTIFIERS)}"
    return f"(?{rng.choice('=!')}{inner()})"


def test_the_answers_are_those_of_re() -> None:
    rng, matched, asked = random.Random(7), 0, 0
    while asked < 2_500:
        text = expression(rng, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                theirs = re.compile(text)
            except re.error:
                continue
        ours, tail = Pattern(text), Tail(text)
        ending = re.compile(rf"(.*\.)?({text})")
        for _ in range(5):
            name = "".join(rng.choice("ab.1_-") for _ in range(rng.randrange(1, 7)))
            expected = theirs.fullmatch(name) is not None
            assert ours.fullmatch(name) == expected, (text, name)
            assert tail.fullmatch(name) == (ending.fullmatch(name) is not None), (text, name)
            asked, matched = asked + 1, matched + expected
    assert matched > 80, "the comparison must see both answers"


@pytest.mark.parametrize("key", ["q_proj", r"layers\.1\.self_attn\.q_proj", "layers.1.self_attn.q_proj", "^q_proj"])
def test_a_plain_tail_is_compared_by_whole_components(key: str) -> None:
    for name in ("q_proj", "layers.1.self_attn.q_proj", "layers.11.self_attn.q_proj", "eq_proj", "a.eq_proj"):
        assert Tail(key).fullmatch(name) == (re.match(rf"(.*\.)?({key})$", name) is not None), name


@pytest.mark.parametrize(
    "bomb",
    [
        r"(([a-z_0-9]+\.?)+)+!",
        r"(a|a)*b",
        r"(.*a){12}",
        r"(?=(a+)+$)(a|b|ab)*c",
        r"(x+x+)+y",
        r"^(([a-z])+.)+[A-Z]([a-z])+$",
    ],
)
def test_bombs_are_quick(bomb: str) -> None:
    start = time.process_time()
    assert Pattern(bomb).fullmatch("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-") is False
    assert time.process_time() - start < 1


def test_the_budget_is_shared_and_ends() -> None:
    budget = Budget(8000)
    patterns = [Pattern(f".*{i}.*", budget) for i in range(20)]
    with pytest.raises(ValueError, match="its patterns take too much work to match"):
        any(pattern.fullmatch("model.layers.0.self_attn.k_proj") for _ in range(100) for pattern in patterns[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "not a regular expression: missing ), unterminated subpattern at position 0"),
        ("a)|(b", "not a regular expression: unbalanced parenthesis at position 1"),
        (r"(a)\1", "references to groups, conditions and atomic groups are not supported in a pattern"),
        ("(?>a+)b", "references to groups, conditions and atomic groups are not supported in a pattern"),
        ("(?<=a)b", "looking behind is not supported in a pattern"),
        ("(?i)a", "flags inside a pattern are not supported"),
        ("(?i:a)", "flags inside a pattern are not supported"),
        ("((a{100}){100}){100}", "a pattern of more than 20,000 states: its repetitions are too large"),
        ("a" * 20_001, "a pattern of 20,001 characters, more than 20,000"),
        ("(" * 9_000 + ")" * 9_000, "a pattern nested too deeply"),
    ],
)
def test_what_is_not_supported_is_said(text: str, message: str) -> None:
    for kind in (Pattern, Tail):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            kind(text)
        assert str(caught.value) == message
