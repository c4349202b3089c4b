"""Patterns from untrusted files: the answers of `re.fullmatch`, in bounded time and memory."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest

from lorary.files.bounded_regex import Budget, Pattern, SuffixPattern

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
        ours, tail = Pattern(text), SuffixPattern(text)
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
        assert SuffixPattern(key).fullmatch(name) == (re.match(rf"(.*\.)?({key})$", name) is not None), name


NAME = "a" * 55 + "-"


def answer(text: str, name: str) -> bool | str:
    """Whether the pattern matches, or why that is not known."""
    try:
        return Pattern(text, Budget(seconds=0.5)).fullmatch(name)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "bomb",
    [
        r"(([a-z_0-9]+\.?)+)+[!?]",
        r"(a|a)*[b!]",
        r"(.*a){12}",
        r"(?=(a+)+$)(a|b|ab)*c",
        r"(x+x+)+y",
        r"^(([a-z])+.)+[A-Z]([a-z])+$",
        r"(?:a|aa|aaa|aaaa)*\b[B!]",
        r"((a?){50}){50}[B!]",
        r"(?:(?:a?b?){1,30}c?){1,30}[B!]",
        "(?:" + "a?" * 9_000 + ")[B!]",
        "(.*)" * 50 + r"\1\2[B!]",
        r"(?:(?=(.*.*.*.*.*[B!]))?a?)*[B!]",
    ],
)
def test_hostile_patterns_are_refused_in_time(bomb: str) -> None:
    start = time.process_time()
    assert answer(bomb, NAME) in (False, "its patterns take too much time to match")
    assert time.process_time() - start < 1


def test_the_time_is_shared_and_ends() -> None:
    budget = Budget(seconds=0.3)
    bomb, harmless = Pattern("(?:a|aa|aaa)*[B!]", budget), Pattern("q_proj", budget)
    assert harmless.fullmatch("q_proj")
    for pattern, name in ((bomb, NAME), (harmless, "q_proj")):
        with pytest.raises(ValueError, match="its patterns take too much time to match"):
            pattern.fullmatch(name)


def test_compiling_and_plain_patterns_take_time_as_well() -> None:
    message = "its patterns take too much time to match"
    budget = Budget(seconds=0.05)
    with pytest.raises(ValueError, match=message):
        [SuffixPattern(rf"layers\.{i}\.q_proj", budget) for i in range(10_000)]
    plain = Pattern("q_proj", Budget(seconds=0.05))
    with pytest.raises(ValueError, match=message):
        any(plain.fullmatch("k_proj") for _ in range(10_000_000))


def test_the_size_is_shared_and_ends() -> None:
    budget = Budget(states=100)
    with pytest.raises(ValueError, match="its patterns are too large together"):
        [Pattern(f"(layers|{i}){{10}}", budget) for i in range(3)]


@pytest.mark.parametrize("quantifier", ["+", "{1,}", "++", "{2}", "{0,3}"])
def test_nested_repetitions_are_refused_before_they_are_written_out(quantifier: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match="a pattern of more than 20,000 states"):
        Pattern("(?:" * 60 + "a" + f"){quantifier}" * 60)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "text",
    [
        r"(a|b)\1",
        r"(?P<x>a|b)c?(?P=x)",
        r"(?>a+)b",
        r"(?>a+)ab|b",
        r"a++b",
        r"a*+ab|b",
        r"(?<=a)b|ab",
        r".*(?<=a)b",
        r".*(?<!a)b",
        r"(a)?(?(1)b|-)",
        r"[[a]b",
        r"[+--b]*",
        r"[a&&b|]*",
        r"[]a]+[^]b]",
        r"a{,2}b{2,}",
        r"(?:a|){3}b",
        r"[\]b]*[\w.-]",
        r"\Aab*\Z",
    ],
)
def test_what_few_patterns_use_is_answered_as_by_re(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = re.compile(text)
    names = [start + end for start in ("", "a", "b", "aa", "ab", "bb", "-") for end in ("", "a", "b", "ab", "&b", "-.")]
    answers = {name: Pattern(text).fullmatch(name) for name in names}
    assert answers == {name: theirs.fullmatch(name) is not None for name in names}
    assert set(answers.values()) == {True, False}


def test_letters_outside_ascii() -> None:
    assert Pattern("größe|ß[ü-ÿ]*").fullmatch("größe")
    assert not Pattern(".*_proj").fullmatch("größe")
    assert Pattern(r"\wß\b").fullmatch("ßß"), "no repetition: `re` itself"
    with pytest.raises(ValueError, match=r"classes such as \\w are not supported for the name '\\xdf\\u0301'"):
        Pattern(r"\w*").fullmatch("ß\u0301")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "not a regular expression: missing ), unterminated subpattern at position 0"),
        ("a)|(b", "not a regular expression: unbalanced parenthesis at position 1"),
        (r"\p{L}+", r"not a regular expression: bad escape \p at position 0"),
        ("(?|a|b)", "not a regular expression: unknown extension ?| at position 1"),
        ("a{99999999999}", "not a regular expression: the repetition number is too large"),
        ("(?i)a", "flags inside a pattern are not supported"),
        ("(?i:a)", "flags inside a pattern are not supported"),
        ("(?-i:a)", "flags inside a pattern are not supported"),
        ("(?#[)(?i:a)]", "comments are not supported in a pattern"),
        ("[[:alpha:]]", "[: in a set of characters is not supported in a pattern"),
        ("[a[:alpha:]]*", "[: in a set of characters is not supported in a pattern"),
        ("(?:q_proj){e<=1}", r"a brace that is not a repetition must be written \{ in a pattern"),
        ("(?:q_proj){i}", r"a brace that is not a repetition must be written \{ in a pattern"),
        ("a{}", r"a brace that is not a repetition must be written \{ in a pattern"),
        ("((a{100}){100}){100}", "a pattern of more than 20,000 states: its repetitions are too large"),
        ("a" * 20_001, "a pattern of 20,001 characters, more than 20,000"),
        ("(" * 9_000 + ")" * 9_000, "a pattern nested too deeply"),
        ("(?:" * 300 + "a" + ")?" * 300, "a pattern nested too deeply"),
    ],
)
def test_what_is_not_supported_is_said(text: str, message: str) -> None:
    for kind in (Pattern, SuffixPattern):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
            kind(text)
        assert str(caught.value) == message
