"""Differences of figures that a run has one of: their intervals in closed form, how often they hold, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorary.analysis.comparison.over_seeds import differences_over_seeds
from lorary.errors import DataError

# Student's t at 97.5 %, and at 99.375 %: two of four pairs together
T_4, T_8, T_4_OF_4 = 2.776, 2.306, 4.315


def figures(
    generator: np.random.Generator, arms: int = 5, seeds: int = 5, shift: float = 0.0
) -> dict[str, list[float]]:
    """Figures without a difference between the arms, but for the last one's shift."""
    found = {f"arm {i}": list(generator.normal(10, 1, seeds)) for i in range(arms)}
    found[f"arm {arms - 1}"] = [value + shift for value in found[f"arm {arms - 1}"]]
    return found


def test_two_arms_have_students_interval() -> None:
    values = figures(np.random.default_rng(1), arms=2)
    ours, theirs = values.values()
    (found,) = differences_over_seeds(values, [("arm 0", "arm 1")]).values()
    variance = (np.var(ours, ddof=1) + np.var(theirs, ddof=1)) / 2
    assert found.pair.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.pair.high - found.pair.value == pytest.approx(T_8 * math.sqrt(2 * variance / 5), rel=0.03)
    assert found.joint == found.pair  # there is no other one to hold together with


def test_a_pair_has_the_interval_of_its_differences() -> None:
    """What both runs of a seed have in common does not matter, however large it is."""
    generator = np.random.default_rng(2)
    common = generator.normal(0, 100, 5)
    values = {name: list(common + generator.normal(0, 1, 5)) for name in "abcde"}
    pairs = [(name, "e") for name in "abcd"]
    found = differences_over_seeds(values, pairs, paired=True)
    for pair in pairs:
        differences = np.subtract(*(values[name] for name in pair))
        error = np.std(differences, ddof=1) / math.sqrt(5)
        assert found[pair].pair.high - found[pair].pair.value == pytest.approx(T_4 * error, rel=0.04)
        assert found[pair].joint.high - found[pair].joint.value == pytest.approx(T_4_OF_4 * error, rel=0.08)
    unpaired = differences_over_seeds(values, pairs)[pairs[0]]
    assert unpaired.pair.high - unpaired.pair.low > 20 * (found[pairs[0]].pair.high - found[pairs[0]].pair.low)


@pytest.mark.parametrize("paired", [False, True])
def test_without_a_difference_none_is_shown(paired: bool) -> None:
    """All four joint intervals hold in 95 % of comparisons; of 120 at least 108 do so by chance, but for 1 in 1,000."""
    generator = np.random.default_rng(3)
    pairs = [(f"arm {i}", "arm 0") for i in range(1, 5)]
    held = 0
    for _ in range(120):
        found = differences_over_seeds(figures(generator), pairs, paired=paired)
        held += all(difference.verdict == "no difference shown" for difference in found.values())
    assert held >= 108


def test_planted_differences_are_found() -> None:
    generator = np.random.default_rng(4)
    pairs = [(f"arm {i}", "arm 0") for i in range(1, 5)]
    for shift, verdict in ((-4.0, "better"), (4.0, "worse")):
        found = differences_over_seeds(figures(generator, shift=shift), pairs)
        assert [found[pair].verdict for pair in pairs] == 3 * ["no difference shown"] + [verdict]


def test_an_arm_that_scatters_more_stands_on_its_own_variance() -> None:
    generator = np.random.default_rng(5)
    values = figures(generator) | {"wild": list(generator.normal(10, 50, 5))}
    wild, calm = differences_over_seeds(values, [("wild", "arm 0"), ("arm 1", "arm 0")]).values()
    assert wild.pair.high - wild.pair.low > 20 * (calm.pair.high - calm.pair.low)


def test_a_single_seed_judges_nothing() -> None:
    for paired in (False, True):
        (found,) = differences_over_seeds({"a": [1.0], "b": [2.0]}, [("a", "b")], paired=paired).values()
        assert found.verdict == "not judged"
        assert not found.pair.known
        assert "two seeds" in found.why


@pytest.mark.parametrize(
    ("values", "pairs", "paired", "said"),
    [
        ({"a": []}, [], False, "  - a: has no figures\n      hint: give one for each seed"),
        (
            {"a": [1.0, math.nan]},
            [],
            False,
            "  - a: has the figure nan\n      hint: leave out runs that have diverged, and say so",
        ),
        ({"": [1.0]}, [], False, "  - figures: an arm has an empty name\n      hint: name it"),
        ({"a": [1.0]}, [("a", "a")], False, "  - pairs: 'a' is compared with itself\n      hint: name two arms"),
        (
            {"lora": [1.0], "dora": [2.0]},
            [("lora", "dorra")],
            False,
            "  - pairs: there are no figures of 'dorra'\n      hint: did you mean `dora` or `lora`?",
        ),
        (
            {"a": [1.0, 2.0], "b": [2.0]},
            [("a", "b")],
            True,
            "  - a: has 2 figures, and b 1\n      hint: pair runs with equal seeds",
        ),
    ],
)
def test_bad_figures(values: dict[str, list[float]], pairs: list[tuple[str, str]], paired: bool, said: str) -> None:
    with pytest.raises(DataError) as error:
        differences_over_seeds(values, pairs, paired=paired)
    assert str(error.value) == f"cannot compare figures of runs:\n{said}"


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(DataError) as error:
        differences_over_seeds({"a": [], "b": [math.inf]}, [("c", "d")])
    assert len(error.value.problems) == 4
