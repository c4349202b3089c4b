"""Differences between methods: their intervals keep their level, and find what was planted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from lorary.analysis.comparison._chance import DRAWS, Measured, scatters
from lorary.analysis.comparison.record import Comparison, Scores, Trial
from lorary.analysis.comparison.statistics import Findings, Interval, chosen_rate, findings, why_untuned
from lorary.errors import DataError
from tests.comparisons import EFFECTS, RATES, comparison, diverged

SEED_NOISE = 0.01


def measured(
    generator: np.random.Generator,
    seeds: int,
    effects: tuple[float, ...],
    *,
    rows: int = 40,
    row_noise: float = 0.03,
    seed_noises: tuple[float, ...] = (),
) -> Measured:
    """Losses with planted noise of rows, of seeds, and of both."""
    tokens = generator.integers(5, 60, rows).astype(np.float64)
    common = generator.normal(3, 1, rows)
    sums = {}
    for i, effect in enumerate(effects):
        means = common + effect + generator.normal(0, row_noise, rows)
        by_seed = generator.normal(0, seed_noises[i] if seed_noises else SEED_NOISE, (seeds, 1))
        sums[str(i)] = (means + by_seed + generator.normal(0, 0.02, (seeds, rows))) * tokens
    return Measured(sums, tokens)


def held(found: Measured, pairs: list[tuple[str, str]], factor: float = 1.0) -> bool:
    """Whether the intervals of arms without a difference hold zero."""
    return all(abs(found.value(*pair)) <= factor * found.half_width(*pair) for pair in pairs)


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("arms", [2, 6])
def test_intervals_keep_their_level(seeds: int, arms: int) -> None:
    """Of a pair, and of all pairs together, at 95 %, with planted noise of rows and seeds."""
    generator = np.random.default_rng(seeds * 10 + arms)
    every = [*combinations(map(str, range(arms)), 2)]
    times = 150 if arms == 2 else 80
    pair = all_pairs = 0
    for _ in range(times):
        found = measured(generator, seeds, (0.0,) * arms)
        pair += held(found, every[:1])
        all_pairs += held(found, every, found.joint_factor(every))
    assert pair / times >= 0.93
    assert all_pairs / times >= 0.93


def test_the_simulation_can_fail() -> None:
    """With either source of chance left out the level is lost."""
    generator = np.random.default_rng(3)
    rows_alone = seeds_alone = 0
    for _ in range(50):
        found = measured(generator, 3, (0.0, 0.0), seed_noises=(0.02, 0.02))
        without_seeds = measured(generator, 3, (0.0, 0.0), seed_noises=(0.0, 0.0)).half_width("0", "1")
        rows_alone += abs(found.value("0", "1")) <= without_seeds
        found = measured(generator, 3, (0.0, 0.0), row_noise=0.1)
        without_rows = 1.96 * math.sqrt(2 / 3 * found.scatter["0"].variance)
        seeds_alone += abs(found.value("0", "1")) <= without_rows
    assert rows_alone < 40
    assert seeds_alone < 40


def test_three_seeds_find_three_standard_deviations_of_a_seed() -> None:
    generator = np.random.default_rng(4)
    times = 60
    found = sum(
        not held(measured(generator, 3, (0.0, 3 * SEED_NOISE, 0.0, 0.0), row_noise=0.01), [("0", "1")])
        for _ in range(times)
    )
    assert found / times > 0.75


def test_a_method_that_scatters_more_stands_on_its_own_variance() -> None:
    generator = np.random.default_rng(5)
    found = measured(generator, 3, (0.0,) * 6, seed_noises=(0.3, *(0.01,) * 5))
    assert not found.scatter["0"].pooled
    assert found.scatter["0"].freedom == 2
    assert {found.scatter[str(i)].pooled for i in range(1, 6)} == {True}
    assert found.scatter["1"].freedom == 10  # without the one that stands apart
    assert found.scatter["1"].variance < 0.02**2


def test_two_methods_that_scatter_more_do_not_hide_each_other() -> None:
    spread = np.array([-1.0, 0.2, 0.8])
    seeds = {"a": 0.3 * spread, "b": 0.4 * spread} | {str(i): (0.01 + 0.001 * i) * spread for i in range(6)}
    found = scatters(seeds, dict.fromkeys(seeds, 0.0))
    assert [arm for arm, scatter in found.items() if not scatter.pooled] == ["a", "b"]


def test_the_pooled_variance_is_that_within_the_arms() -> None:
    seeds = {"a": np.array([1.0, 1.2]), "b": np.array([5.0, 5.1, 5.2]), "c": np.array([2.0])}
    found = scatters(seeds, dict.fromkeys(seeds, 0.0))
    assert found["a"] == found["b"] == found["c"]  # a method with one seed is taken to scatter as the others do
    assert found["a"].freedom == 3
    assert found["a"].variance == pytest.approx((0.02 * 1 + 0.01 * 2) / 3)


def test_without_two_seeds_there_is_no_variance() -> None:
    assert scatters({"a": np.array([1.0]), "b": np.array([2.0])}, {}) == {}


def test_the_width_is_that_of_students_t() -> None:
    """Without noise of rows: t with 4 degrees of freedom at 97.5 % is 2.776 (any table)."""
    spread = np.array([-1.0, 0.0, 1.0])[:, None]
    rows = np.ones((3, 50))
    found = Measured({"a": rows + 0.01 * spread, "b": rows + 0.01 * spread}, np.ones(50))
    assert found.half_width("a", "b") == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3), rel=0.05)


def test_the_joint_width_is_tukeys() -> None:
    """Without noise of rows: the studentised range of 4 means with 8 degrees of freedom is 4.529 (any table)."""
    spread = np.array([-1.0, 0.0, 1.0])[:, None]
    found = Measured({str(i): np.ones((3, 50)) + 0.01 * spread for i in range(4)}, np.ones(50))
    joint = found.joint_factor([*combinations("0123", 2)]) * found.half_width("0", "1")
    assert joint == pytest.approx(4.529 / math.sqrt(2) * 0.01 * math.sqrt(2 / 3), rel=0.05)


def test_the_width_by_rows_is_that_of_paired_differences() -> None:
    """Without noise of seeds: 1.96 standard errors of the rows' differences, however much the rows differ."""
    generator = np.random.default_rng(6)
    common, own = generator.normal(3, 2, 200), generator.normal(0, 0.05, 200)
    found = Measured({"a": np.stack([common] * 2), "b": np.stack([common + own] * 2)}, np.ones(200))
    assert found.half_width("a", "b") == pytest.approx(1.96 * own.std(ddof=1) / math.sqrt(200), rel=0.05)
    assert found.value("b", "a") == pytest.approx(own.mean())


def test_rows_count_by_their_tokens() -> None:
    sums = np.array([[1.0, 30.0]] * 2)
    found = Measured({"a": sums}, np.array([1.0, 10.0]))
    assert found.value("a") == pytest.approx(31 / 11)


@pytest.fixture(scope="module")
def found() -> Findings:
    return findings(comparison())


def test_verdicts(found: Findings) -> None:
    assert (found.reference, found.best, found.measure) == ("lora", "pissa", "loss")
    assert {arm: d.verdict for arm, d in found.against_reference.items()} == {
        "pissa": "better",
        "dora": "no difference shown",
        "lora+": "no difference shown",
        "vera": "worse",
        "ia3": "worse",
    }
    assert {d.verdict for d in found.against_best.values()} == {"worse"}
    assert found.standings[0].arm == "pissa"
    assert [s.arm for s in found.standings][-2:] == ["vera", "ia3"]


def test_the_joint_interval_is_the_wider_one_around_the_same_value(found: Findings) -> None:
    for difference in (*found.against_reference.values(), *found.against_best.values()):
        assert difference.joint.low < difference.pair.low < difference.pair.value
        assert difference.pair.value == difference.joint.value


def test_the_same_record_gives_the_same_numbers(found: Findings) -> None:
    assert findings(comparison()) == found


def test_the_verdict_on_a_pair_is_one_whichever_is_the_reference() -> None:
    effects = {f"m{i}": 0.015 * i for i in range(8)}
    for name in ("m0", "m3"):
        found = findings(comparison(effects), name)
        turned = {"better": "worse", "worse": "better"}
        for arm, difference in found.against_reference.items():
            again = findings(comparison(effects), arm).against_reference[name]
            assert turned.get(again.verdict, again.verdict) == difference.verdict
        if name != found.best:
            ahead = found.against_reference[found.best]
            assert turned.get(ahead.verdict, ahead.verdict) == found.against_best[name].verdict


def test_another_reference_turns_the_sign(found: Findings) -> None:
    other = findings(comparison(), "pissa").against_reference["lora"]
    assert other.verdict == "worse"
    assert other.pair.value == -found.against_reference["pissa"].pair.value


def test_forgetting_is_the_change_on_general_text(found: Findings) -> None:
    lora = next(s for s in found.standings if s.arm == "lora")
    assert lora.forgotten is not None
    assert lora.forgotten.low < 0.05 < lora.forgotten.high
    assert found.base is not None
    assert found.base > 4.8


def test_one_method_under_two_names_is_rarely_different() -> None:
    verdicts = [
        findings(comparison({"lora": 0.0, "again": 0.0}, seed=seed)).against_reference["again"].verdict
        for seed in range(20)
    ]
    assert verdicts.count("no difference shown") >= 19


def test_classifiers_are_judged_by_accuracy() -> None:
    found = findings(comparison({"lora": 0.0, "bad": 0.3}, classifier=True, rows=300))
    assert found.measure == "accuracy"
    difference = found.against_reference["bad"]
    assert difference.verdict == "worse"
    assert difference.pair.value < -0.2
    best = found.standings[0]
    assert best.accuracy is not None
    assert 0 <= best.accuracy.low < best.accuracy.value < best.accuracy.high <= 1
    assert best.forgotten is None


def always_right(run: Trial) -> Trial:
    return replace(run, test=run.test and replace(run.test, right=run.test.tokens))


def test_a_classifier_without_errors_may_still_make_some() -> None:
    """The bootstrap of rows without an error has no width: the rule of three has one."""
    record = comparison({"lora": 0.0, "dora": 0.0}, classifier=True, rows=100)
    record = replace(record, trials=tuple(map(always_right, record.trials)))
    found = findings(record)
    assert found.standings[0].accuracy == Interval(1.0, 0.97, 1.0)
    assert found.against_reference["dora"].verdict == "no difference shown"
    assert found.against_reference["dora"].pair.high == pytest.approx(0.03)


def test_no_interval_of_a_loss_reaches_below_zero() -> None:
    loss = findings(comparison({"lora": -3.3}, rows=12)).standings[0].loss
    assert loss is not None
    assert loss.high - loss.value > loss.value, "it would"
    assert 0.0 == loss.low < loss.value


def test_one_seed_gives_no_verdict() -> None:
    found = findings(comparison(seeds=1))
    difference = found.against_reference["vera"]
    assert difference.verdict == "not judged"
    assert difference.why == "no method has two seeds, so that their part in the difference is unknown"
    assert not difference.pair.known
    assert math.isnan(found.standings[0].spread)


def test_one_row_gives_no_verdict() -> None:
    assert findings(comparison(rows=1)).against_reference["vera"].why == "there is a single test row"


def at_rate(record: Comparison, arm: str, lr: float, **changes: Any) -> Comparison:
    """A comparison in which the runs of an arm at a rate are others."""
    runs = [replace(run, **changes) if (run.arm, run.lr) == (arm, lr) else run for run in record.trials]
    return replace(record, trials=tuple(runs))


def without(record: Comparison, arm: str, *rates: float) -> Comparison:
    return replace(record, trials=tuple(run for run in record.trials if run.arm != arm or run.lr not in rates))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (comparison(), ""),
        (without(comparison(), "lora", RATES[0]), "its best rate, 0.0003, is the lowest that was tried"),
        (without(comparison(), "lora", RATES[2]), "its best rate, 0.0003, is the highest that was tried"),
        (without(comparison(), "lora", RATES[0], RATES[2]), "0.0003 is the only rate that was tried"),
        (without(comparison(), "lora", *RATES), "it was not run"),
        (at_rate(comparison(), "lora", RATES[2], ending="diverged"), ""),  # too large a rate is an answer
        (at_rate(comparison(), "lora", RATES[0], ending="hopeless"), ""),
    ],
)
def test_untuned(record: Comparison, why: str) -> None:
    assert why_untuned(record, "lora") == why


def test_all_diverged() -> None:
    record = comparison()
    for lr in RATES:
        record = at_rate(record, "lora", lr, ending="diverged", test=None)
    assert chosen_rate(record, "lora") is None
    assert why_untuned(record, "lora") == "no run of it finished"
    found = findings(record)
    assert found.reference == ""
    assert found.against_reference == {}
    assert found.standings[-1].arm == "lora"
    assert found.standings[-1].loss is None
    assert len(found.against_best) == len(EFFECTS) - 2


def test_seeds_that_diverge_are_counted_and_nothing_is_judged_in_their_favour() -> None:
    """The good one would win by the seed that survived; the bad one is worse with it already."""
    record = diverged(diverged(comparison({"lora": 0.0, "good": -0.3, "bad": 0.3}), "good"), "bad")
    found = findings(record)
    assert [(s.arm, s.seeds, s.diverged) for s in found.standings] == [("lora", 2, 0), ("good", 1, 1), ("bad", 1, 1)]
    assert found.best == "lora"
    verdicts = {arm: (d.verdict, d.why) for arm, d in found.against_reference.items()}
    assert verdicts == {"good": ("not judged", "1 of 2 seeds of good diverged"), "bad": ("worse", "")}


def test_a_reference_with_diverged_seeds_is_never_better() -> None:
    record = diverged(comparison({"lora": 0.0, "good": -0.3, "bad": 0.3, "same": 0.0}), "lora")
    verdicts = {arm: d.verdict for arm, d in findings(record).against_reference.items()}
    assert verdicts == {"good": "better", "bad": "not judged", "same": "not judged"}


def test_two_methods_with_diverged_seeds_are_not_compared() -> None:
    record = diverged(diverged(comparison({"lora": 0.0, "bad": 0.3}, seeds=3), "lora"), "bad")
    found = findings(record)
    assert found.best == "lora"
    assert (found.against_best["bad"].verdict, found.against_best["bad"].why) == (
        "not judged",
        "1 of 3 seeds of lora diverged",
    )


def test_a_method_whose_judged_seeds_all_diverge_is_not_judged() -> None:
    record = comparison({"lora": 0.0, "good": -0.3}, seeds=3)
    search = next(run for run in record.trials if run.arm == "good" and run.test)  # at the best rate, not judged
    unjudged = replace(search, test=None, general=None)
    trials = tuple(unjudged if run is search else run for run in record.trials)
    found = findings(diverged(replace(record, trials=trials), "good", seeds=2))
    assert [(s.arm, s.seeds, s.diverged, s.loss is None) for s in found.standings] == [
        ("lora", 3, 0, False),
        ("good", 0, 2, True),
    ]


def test_test_scores_never_choose_the_rate() -> None:
    """A rate with the worst validation loss is not chosen, whatever its test loss is."""
    record = comparison()
    best = next(run.test for run in record.trials if run.arm == "lora" and run.test)
    perfect = Scores(tuple(0.0 for _ in best.nats), best.tokens, best.tokens)
    assert chosen_rate(at_rate(record, "lora", RATES[0], test=perfect), "lora") == RATES[1]


def test_scores_that_are_not_finite_are_not_judged() -> None:
    record = comparison()
    scores = next(run.test for run in record.trials if run.arm == "dora" and run.test)
    broken = replace(scores, nats=(math.nan, *scores.nats[1:]))
    found = findings(at_rate(record, "dora", RATES[1], test=broken))
    assert found.standings[-1].arm == "dora"
    assert found.standings[-1].seeds == 0


@pytest.mark.parametrize("rows", [{"test": 7}, {"general": 9}])
def test_rows_that_cannot_be_paired(rows: Mapping[str, int]) -> None:
    record = comparison()
    ((field, count),) = rows.items()
    other = comparison(rows=count)
    scores = next(getattr(run, field) for run in other.trials if getattr(run, field))
    record = at_rate(record, "vera", RATES[1], **{field: scores})
    with pytest.raises(DataError) as caught:
        findings(record)
    assert len(caught.value.problems) == 2  # both seeds
    total = sum(scores.tokens)
    assert f"was scored on {count} rows with {total} tokens of {field} text, and the base on 120 rows" in str(
        caught.value
    )


def test_an_unknown_reference() -> None:
    with pytest.raises(DataError) as caught:
        findings(comparison(), "lorra")
    assert str(caught.value) == (
        "cannot compare:\n  - reference: there is no method 'lorra'\n"
        "      hint: did you mean `lora` or `lora+` or `dora`?"
    )


def test_an_empty_comparison() -> None:
    found = findings(replace(comparison(), trials=()))
    assert found.best == found.reference == ""
    assert {s.untuned for s in found.standings} == {"it was not run"}
    assert findings(replace(comparison(), trials=(), arms=())).standings == ()


def test_thirty_methods_and_five_hundred_rows() -> None:
    found = findings(comparison({f"m{i}": 0.0 for i in range(30)}, rows=500))
    assert len(found.against_best) == 29
    assert DRAWS >= 1000
