"""Words: frozen dataclasses known by their names, and what their fields may hold."""

from __future__ import annotations

import dataclasses

import pytest

from lorary import words
from lorary.words import COUNT, POSITIVE


def test_a_word_is_a_dataclass_with_a_name_of_its_own() -> None:
    with pytest.raises(TypeError, match="LowRank must be a dataclass with a name of its own"):
        words.word(dataclasses.make_dataclass("LowRank", ["r"], frozen=True))
    with pytest.raises(TypeError, match="int must be a dataclass"):
        words.word(int)


@pytest.mark.parametrize("value", [1, 16, 10**9])
def test_a_count(value: object) -> None:
    assert COUNT["check"](value)
    assert POSITIVE["check"](value)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "3", None, float("nan")])
def test_no_count(value: object) -> None:
    assert not COUNT["check"](value)


@pytest.mark.parametrize("value", [0, -1.5, True, "3", None, float("nan"), float("inf"), 1 + 0j])
def test_no_positive_number(value: object) -> None:
    assert not POSITIVE["check"](value)


def test_every_word_is_frozen_and_says_what_its_fields_take() -> None:
    for name, cls in words.WORDS.items():
        assert cls.__name__ == name
        assert cls.__dataclass_params__.frozen, f"{name} could be changed after it was checked"
        for field in dataclasses.fields(cls):
            assert {"check", "expects"} <= set(field.metadata), f"{name}.{field.name} is checked by nobody"
