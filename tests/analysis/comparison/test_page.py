"""The words, tables, pictures and page of a comparison."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

import lorary
from lorary.analysis.comparison import pictures
from lorary.analysis.comparison.page import comparison_page
from lorary.analysis.comparison.record import Comparison
from lorary.analysis.comparison.statistics import Findings, Interval, Standing, findings
from lorary.analysis.comparison.tables import (
    as_record,
    costs,
    limits,
    quality,
    quartiles,
    runs,
    serving,
    settings,
    summary,
    views,
)
from lorary.analysis.comparison.words import change, level, names, rate, remarks, signed, verdict
from tests.analysis.test_html_report import read
from tests.comparisons import RATES, comparison, diverged


@pytest.fixture(scope="module")
def found() -> Findings:
    return findings(comparison())


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (
            comparison(),
            "pissa is better than all 5 other methods: 3.323 nats per token, 0.072 [0.035, 0.109] below dora.",
        ),
        (
            comparison({"lora": 0.0, "bad": 0.3}),
            "lora is better than bad: 3.412 nats per token, 0.285 [0.255, 0.316] below bad.",
        ),
        (
            comparison({"lora": 0.0, "again": 0.0}),
            "No difference is shown between the 2 methods. again has the lowest held-out loss, 3.397 nats per token.",
        ),
        (comparison({"lora": 0.0}), "Only lora was judged: 3.412 nats per token."),
        (replace(comparison(), trials=()), "No method was judged on the test rows."),
        (
            comparison({"lora": 0.0, "bad": 0.3}, seeds=1),
            "lora has the lowest held-out loss, 3.416 nats per token, and nothing is decided: no method has two seeds, "
            "so that their part in the difference is unknown.",
        ),
        (
            comparison(classifier=True),
            "pissa has the highest accuracy, 98.3 % of the test rows right; no difference from lora, dora and lora+ is "
            "shown. Worse: vera and ia3.",
        ),
    ],
)
def test_verdict(record: Comparison, sentence: str) -> None:
    """To the digit: the numbers are those of a seeded simulation, and the sentence is what a user reads first."""
    assert re.sub(r"\d\.\d{3}|\d\d\.\d", "#", verdict(findings(record))) == re.sub(r"\d\.\d{3}|\d\d\.\d", "#", sentence)


def test_a_better_classifier_is_ahead_by_points() -> None:
    found = findings(comparison({"lora": 0.4, "good": 0.0}, classifier=True, rows=400))
    assert re.fullmatch(
        r"good is better than lora: \d\d\.\d % of the test rows right, "
        r"\d\d\.\d points \[\d\d\.\d, \d\d\.\d\] above lora\.",
        verdict(found),
    )


def test_remarks(found: Findings) -> None:
    assert [*remarks(found)] == [
        "Compared with lora: better: pissa; worse: vera and ia3; no difference shown: dora and lora+.",
        "Differences of less than about 0.037 nats per token are not shown by so few seeds and rows.",
    ]


def test_what_weakens_a_result_is_said() -> None:
    record = comparison(seeds=2)
    kept = [run for run in record.trials if (run.arm, run.lr) != ("dora", RATES[2])]
    kept = [run for run in kept if run.arm != "ia3"]
    second = next(run for run in reversed(kept) if run.arm == "lora" and run.test)
    found = findings(replace(record, trials=tuple(run for run in kept if run is not second)))
    assert [*remarks(found)][2:] == [
        "Not tuned, as the best rate is the lowest or the highest that was tried: dora.",
        "Not judged: ia3.",
        "With a single seed, and taken to scatter over seeds as the others do: lora.",
    ]


@pytest.mark.parametrize(
    ("effects", "unstable", "sentence"),
    [
        (
            {"lora": 0.0, "good": -0.3, "bad": 0.3},
            ["good"],
            "lora is better than bad: # nats per token, # [#, #] below bad. Undecided: good, as some of its seeds "
            "diverged.",
        ),
        (
            {"lora": 0.0, "again": 0.0, "good": -0.3, "also": -0.3},
            ["good", "also"],
            "No difference is shown between again and lora. again has the lowest held-out loss of the methods none of "
            "whose seeds diverged, # nats per token. Undecided: good and also, as some of their seeds diverged.",
        ),
        (
            {"lora": 0.0, "again": 0.0, "good": -0.3, "bad": 0.3},
            ["good"],
            "again has the lowest held-out loss of the methods none of whose "
            "seeds diverged, # nats per token; no difference from lora is shown. Worse: bad. "
            "Undecided: good, as some of its seeds diverged.",
        ),
        (
            {"lora": 0.0, "good": -0.3},
            ["good"],
            "lora has the lowest held-out loss of the methods none of whose "
            "seeds diverged, # nats per token, and nothing is decided: 1 of 2 seeds of good "
            "diverged.",
        ),
        ({"lora": 0.0, "bad": 0.3}, ["bad"], "lora is better than bad: # nats per token, # [#, #] below bad."),
    ],
)
def test_a_method_with_diverged_seeds_is_undecided_unless_it_is_worse(
    effects: dict[str, float], unstable: list[str], sentence: str
) -> None:
    record = comparison(effects)
    for arm in unstable:
        record = diverged(record, arm)
    found = findings(record)
    assert re.sub(r"\d\.\d{3}", "#", verdict(found)) == sentence
    remark = f"{unstable[0]} diverged with 1 of 2 seeds at its best rate."
    assert remark in [*remarks(found)]
    for table in (quality(found), summary(found)):
        column = [*table.head].index("diverged")
        assert [(row[0], row[column]) for row in table.rows if row[column]] == [
            (s.arm, "1 of 2") for s in found.standings if s.arm in unstable
        ]
    page = comparison_page(found)
    assert remark in page
    assert "1 of 2" in page
    counts = {method["name"]: method["diverged"] for method in as_record(found)["methods"]}
    assert counts == {arm: int(arm in unstable) for arm in effects}


def test_without_diverged_seeds_there_is_no_column_of_them(found: Findings) -> None:
    assert "diverged" not in [*quality(found).head, *summary(found).head]


def test_numbers_in_words() -> None:
    assert level(Interval(3.41234)) == "3.412"
    assert change(Interval(0.05, -0.01, 0.11), "accuracy") == "+5.0 pp [\N{MINUS SIGN}1.0, +11.0]"
    assert signed(-0.0004, 3) == "0.000"
    assert signed(math.nan, 1) == "nan"
    assert names([*"abcdefgh"]) == "a, b, c, d, e, f and 2 more"
    assert rate(Standing("lora", None, 0, "it was not run")) == ""


def test_the_summary(found: Findings) -> None:
    table = summary(found)
    assert [*table.head] == [
        "method",
        "held-out loss",
        "difference from lora",
        "verdict",
        "forgotten",
        "trained numbers",
        "file",
        "peak memory",
        "seconds per step",
        "best rate",
    ]
    assert [row[0] for row in table.rows] == ["pissa", "dora", "lora+", "lora", "vera", "ia3"]
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert table.notes[0] == verdict(found)
    reference = next(row for row in table.rows if row[0] == "lora")
    assert list(reference[2:4]) == ["", ""]  # no difference from itself


def test_the_table_of_quality_ends_with_the_base(found: Findings) -> None:
    table = quality(found)
    assert table.rows[-1][0] == "no adapter"
    assert float(table.rows[-1][1]) == pytest.approx(found.base, abs=1e-3)
    assert "difference from the best, pissa" in table.head
    assert {len(row) for row in table.rows} == {len(table.head)}


def test_the_reference_as_the_best_is_compared_once(found: Findings) -> None:
    head = quality(findings(comparison(), "pissa")).head
    assert [name for name in head if name.startswith("difference")] == ["difference from pissa"]


def test_the_table_of_costs(found: Findings) -> None:
    table = costs(found)
    row = dict(zip(table.head, next(row for row in table.rows if row[0] == "dora"), strict=True))
    assert row["trained numbers"] == "87,552"
    assert row["file"] == "344.3 KiB"
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, 0\.\d+\]", row["seconds per step"])
    assert not {"context taken", "merged / base", "forward pass / base"} & {*table.head}
    table = serving(found)
    row = dict(zip(table.head, next(row for row in table.rows if row[0] == "dora"), strict=True))
    assert row["merges"] == "to rounding"
    assert (row["vllm"], row["lorary"]) == ("no", "yes")


def with_cost(record: Comparison, arm: str, **changes: Any) -> Comparison:
    return replace(record, costs={**record.costs, arm: replace(record.costs[arm], **changes)})


def test_reasons_stand_in_a_table_of_their_own() -> None:
    """Whatever its length: a short reason is one too, and a large error is explained."""
    record = comparison()
    for arm in ("vera", "ia3"):
        record = with_cost(record, arm, merge="no", merge_note="not linear")
    record = with_cost(record, "lora", merge="with an error", merge_note="logits of up to 9 change by up to 2")
    found = findings(record)
    assert {row[0]: row[1] for row in serving(found).rows} == {
        "pissa": "exactly",
        "dora": "to rounding",
        "lora+": "exactly",
        "lora": "with an error",
        "vera": "no",
        "ia3": "no",
    }
    rows = limits(found).rows
    assert ("merging", "not linear", "vera, ia3") in rows
    assert ("merging", "logits of up to 9 change by up to 2", "lora") in rows
    assert as_record(found)["methods"][-1]["merge_note"] == "not linear"
    assert ("vllm", "it has no dora", "dora") in rows
    assert limits(findings(replace(record, costs={}))).rows == []


def test_context_is_a_column_where_a_method_takes_some() -> None:
    table = costs(findings(with_cost(comparison(), "vera", context=20)))
    assert table.head[-1] == "context taken"
    assert [row[-1] for row in table.rows] == ["0", "0", "0", "0", "20", "0"]


def test_without_times_there_are_no_quartiles() -> None:
    assert quartiles(()) is None
    assert quartiles((1.0, 2.0, 3.0, 4.0, 5.0)) == (2.0, 3.0, 4.0)


def test_the_time_of_a_forward_pass_is_a_column_where_it_was_measured() -> None:
    """One method does not merge, and the others were not measured."""
    record = with_cost(comparison(), "dora", forward=(1.5, 1.6, 1.7), merged_forward=(1.0, 1.0, 1.0))
    record = with_cost(record, "vera", forward=(2.0, 2.0, 2.0))
    table = costs(findings(record))
    rows = {row[0]: row[-2:] for row in table.rows}
    assert table.head[-2:] == ["forward pass / base", "merged / base"]
    assert rows["dora"] == ["1.60 [1.55, 1.65]", "1.00 [1.00, 1.00]"]
    assert rows["vera"] == ["2.00 [2.00, 2.00]", ""]
    assert rows["lora"] == ["", ""]
    dora = next(one for one in as_record(findings(record))["methods"] if one["name"] == "dora")
    assert (dora["forward_over_base"], dora["merged_forward_over_base"]) == (1.6, 1.0)


def test_views_of_equal_rank_and_equal_numbers(found: Findings) -> None:
    (rank, about_rank), (numbers, about_numbers) = views(found)
    assert (rank.title, numbers.title) == ("Equal rank", "Equally many trained numbers")
    assert len(rank.rows) == 6
    assert [row[0] for row in numbers.rows] == ["pissa", "lora+", "lora"]
    assert about_rank == "The methods with the rank of lora, 8."
    assert about_numbers == "The methods that train as many numbers as lora, 81,920, within 5%."


def test_a_rank_may_be_that_of_the_preset() -> None:
    record = comparison({"lora": 0.0, "dora": 0.0, "vera": 0.1})
    unsaid = tuple(replace(arm, method={"name": [arm.name]}) for arm in record.arms)
    (rank, about), (numbers, _) = views(findings(with_cost(replace(record, arms=unsaid), "vera", trained=81_920)))
    assert {row[0] for row in rank.rows} == {"lora", "dora"}
    assert {row[0] for row in numbers.rows} == {"lora", "vera"}
    assert about == f"The methods with the rank of lora, {lorary.method('lora').delta.r}."


def test_a_method_of_another_version_has_no_rank() -> None:
    record = comparison({"lora": 0.0, "dora": 0.0})
    unknown = tuple(replace(arm, method={"name": "of-2031"}) for arm in record.arms)
    assert views(findings(replace(record, arms=unknown))) == []


def test_what_the_record_repeats_is_not_on_the_page() -> None:
    record = replace(comparison(rows=9), settings={"request": {"config": "once"}, "timings": [1.5], "base": "b"})
    html = comparison_page(findings(record))
    assert "once" not in html
    assert ">base<" in html


def test_views_only_where_both_exist() -> None:
    assert views(findings(comparison({"lora": 0.0, "pissa": 0.0}))) == []  # they are the same
    assert views(findings(replace(comparison(), costs={}))) == []
    assert views(findings(replace(comparison(), trials=()))) == []


def test_nested_settings() -> None:
    values = {"base": "b", "hashes": {"data": "0a", "of": {"c": 1}}, "seeds": [1, 2]}
    assert settings(values) == [("base", "b"), ("hashes.data", "0a"), ("hashes.of.c", "1"), ("seeds", "[1, 2]")]


def test_the_record_is_json(found: Findings) -> None:
    record = json.loads(json.dumps(as_record(found), allow_nan=False))
    assert (record["best"], record["reference"], record["verdict"]) == ("pissa", "lora", verdict(found))
    vera = next(method for method in record["methods"] if method["name"] == "vera")
    assert vera["against_reference"]["verdict"] == "worse"
    assert vera["trained"] == 2_304
    single = as_record(findings(comparison(seeds=1)))["methods"][0]
    assert single["loss"]["low"] is None
    json.dumps(as_record(findings(replace(comparison(), trials=(), costs={}))), allow_nan=False)


def test_all_runs_are_listed(found: Findings) -> None:
    table = runs(found)
    assert len(table.rows) == len(found.comparison.trials)
    assert ("vera", "0.0001", "hopeless") in {(row[0], row[1], row[6]) for row in table.rows}


def drawn(svg: str) -> str:
    """The text that a picture shows."""
    root = ElementTree.fromstring(svg)
    return " ".join(text for node in root.iter() if node.tag.endswith("text") for text in node.itertext())


def test_the_forest_has_every_method_and_its_verdict(found: Findings) -> None:
    svg = pictures.differences_svg(found, found.against_reference)
    text = drawn(svg)
    for arm, difference in found.against_reference.items():
        assert arm in text
        assert difference.verdict in text
    assert "+0.390" in text  # beyond the axis, as a number
    assert "left is better" in text
    assert "ia3 +0.390 [+0.3" in svg  # in its description
    assert svg == pictures.differences_svg(found, found.against_reference), "the same bytes"


def test_a_classifiers_forest_is_in_percentage_points() -> None:
    found = findings(comparison(classifier=True))
    assert "(percentage points); right is better" in drawn(pictures.differences_svg(found, found.against_reference))


def test_the_picture_of_rates_says_why_a_run_stopped(found: Findings) -> None:
    assert "hopeless" in drawn(pictures.rates_svg(found, "vera"))
    assert "hopeless" not in drawn(pictures.rates_svg(found, "lora"))


def test_more_curves_than_colours() -> None:
    svg = pictures.curves_svg(findings(comparison({f"_m{i}": 0.01 * i for i in range(12)})))
    text = drawn(svg)
    assert "the others" in text
    assert " _m0" in text  # a legend leaves out names with an underscore
    assert "_m11" not in text
    assert "_m11 ends at 3." in svg


def test_what_is_smaller_and_better_is_the_front(found: Findings) -> None:
    svg = pictures.trade_off_svg(found, lambda cost: cost.trained, "trained numbers")
    assert "not beaten in both: vera and pissa" in svg
    assert {*found.comparison.costs} <= {*drawn(svg).split()}
    nothing = pictures.trade_off_svg(found, lambda cost: 0, "trained numbers")
    assert "no method has both" in nothing


def test_names_of_points_do_not_touch() -> None:
    places = pictures.spread([0.1, 0.1, 0.1, 0.98, 0.99, 1.0], 0.1)
    assert places == sorted(places)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(places))
    assert places[-1] <= 1


ODD = {
    "nothing ran": replace(comparison(), trials=(), costs={}),
    "no method": replace(comparison(), trials=(), arms=(), costs={}),
    "one method": comparison({"lora": 0.0}),
    "one seed": comparison(seeds=1),
    "one row": comparison(rows=1),
    "no costs": replace(comparison(), costs={}),
    "no base": replace(comparison(), base_test=None, base_general=None),
    "all diverged": replace(
        comparison(),
        trials=tuple(
            replace(run, ending="diverged", test=None, general=None, curve=((0, 5.0), (20, math.nan)))
            for run in comparison().trials
        ),
    ),
    "no curves": replace(comparison(), trials=tuple(replace(run, curve=()) for run in comparison().trials)),
    "identical runs": comparison({"lora": 0.0, "again": 0.0}, seed_noise=0.0),
    "thirty methods": comparison({f"method-with-a-long-name-{i}": 0.02 * i for i in range(30)}, rows=20),
    "hostile names": comparison({"<b>$x^": 0.0, "_": 0.1, "漢字🙂": 0.2, "n" * 300: 0.3}, rows=20),
    "hostile settings": replace(
        comparison(rows=20), settings={"</pre><script>": "a\nb\x1b[31m", "x": {}, "command": 3}
    ),
    "no step times": with_cost(comparison(rows=20), "lora", step_seconds=(), trained=0),
    "a classifier": comparison(classifier=True),
}


@pytest.mark.parametrize("name", ODD)
def test_every_comparison_has_a_page(name: str) -> None:
    html = comparison_page(findings(ODD[name]))
    reader = read(html)
    assert reader.tags.isdisjoint({"script", "img", "iframe", "link"})
    assert "nan" not in " ".join(reader.words).split()
    for arm in ODD[name].arms:
        assert arm.name in "".join(reader.words)


def test_the_page_has_the_verdict_first_and_all_to_repeat_it(found: Findings) -> None:
    html = comparison_page(found)
    reader = read(html)
    text = " ".join(" ".join(reader.words).split())
    assert text.index(verdict(found)) < text.index("held-out loss of the base")
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Verdict",
        "Quality",
        "Cost",
        "Serving",
        "Equal rank",
        "Equally many trained numbers",
        "Learning rates",
        "Loss over the steps",
        "Left out",
        "How chance is counted",
        "To repeat it",
    ]
    for value in ("lorary compare config.yaml", "02ab" * 16, "builtin:topics", "its rank of 8 does not fit"):
        assert value in text
    assert html.count("<svg") == 2 + 2 + 6 + 1
    assert comparison_page(findings(comparison())) == html, "the same bytes"
