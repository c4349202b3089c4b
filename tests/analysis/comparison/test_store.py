"""The file of a comparison: an exact round trip, and a clear sentence for everything else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.analysis.comparison.record import Arm, Comparison, Trial
from lorary.analysis.comparison.store import read, write
from lorary.errors import FileError
from tests.comparisons import comparison

Document = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "comparison.json"


@pytest.mark.parametrize(
    "record",
    [
        comparison(rows=9),
        comparison(rows=9, classifier=True),
        comparison(rows=9, seeds=1),
        replace(comparison(rows=9), trials=(), costs={}, left_out={}, base_test=None, base_general=None),
        Comparison({}, "sft", ()),
        Comparison(
            {"a name": ["ä", None, 1.5, {"x": True}]}, "sft", (Arm("ü/ß", {"r": 8, "targets": ["q"]}, (1e-4,)),)
        ),
    ],
)
def test_round_trip(record: Comparison, path: Path) -> None:
    write(record, path)
    assert read(path) == record
    first = path.read_bytes()
    write(read(path), path)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("text", "kind", "note"),
    [
        ("exactly", "exactly", ""),
        ("has no weight: it is one", "no", "has no weight: it is one"),
        ("with an error: logits of up to 9 change by up to 2", "with an error", "logits of up to 9 change by up to 2"),
    ],
)
def test_the_first_records_have_the_reason_in_merge_itself(text: str, kind: str, note: str, path: Path) -> None:
    write(comparison(rows=9), path)
    document = json.loads(path.read_text())
    document["costs"]["lora"]["merge"] = text
    del document["costs"]["lora"]["merge_note"]
    path.write_text(json.dumps(document))
    cost = read(path).costs["lora"]
    assert (cost.merge, cost.merge_note) == (kind, note)


def test_losses_that_are_not_finite(path: Path) -> None:
    curve = ((0, 5.0), (10, math.inf), (20, math.nan), (30, -math.inf))
    record = Comparison({}, "sft", (Arm("lora", {}, (0.1,)),), (Trial("lora", 0.1, 1, 20, curve, "diverged"),))
    write(record, path)
    found = read(path).trials[0].curve
    assert found[:2] == curve[:2]
    assert math.isnan(found[2][1])
    assert found[3] == curve[3]


def test_whole_numbers_become_floats(path: Path) -> None:
    """Another program may write 5 for 5.0."""
    document = written(path)
    document["arms"][0]["rates"] = [1, 2]
    path.write_text(json.dumps(document))
    assert isinstance(read(path).arms[0].rates[0], float)


def written(path: Path) -> Document:
    write(comparison({"lora": 0.0}, rows=3), path)
    document: Document = json.loads(path.read_text())
    return document


def changed(**values: Any) -> Callable[[Document], object]:
    return lambda document: document.update(values)


def dropped(key: str) -> Callable[[Document], object]:
    return lambda document: document.pop(key)


def trial(number: int, **values: Any) -> Callable[[Document], object]:
    return lambda document: document["trials"][number].update(values)


def setting(**values: Any) -> Callable[[Document], object]:
    return lambda document: document["settings"].update(values)


def scored(**values: Any) -> Callable[[Document], object]:
    return lambda document: document["trials"][1]["test"].update(values)


WRONG: dict[str, tuple[Callable[[Document], object], str]] = {
    "a merge of another kind": (
        lambda document: document["costs"]["lora"].update(merge="often"),
        "- costs.lora.merge: is 'often', not 'exactly' or 'to rounding' or 'with an error' or 'no'",
    ),
    "a merge that is no text": (
        lambda document: document["costs"]["lora"].update(merge=True),
        "- costs.lora.merge: is true, not 'exactly' or 'to rounding' or 'with an error' or 'no'",
    ),
    "a budget as the ending": (
        lambda document: document["trials"][0].update(ending="budget"),
        "- trials[0].ending: is 'budget', not 'finished' or 'diverged' or 'hopeless'",
    ),
    "costs that are no object": (changed(costs=[1]), "- costs: is a list, not an object"),
    "a cost that is no object": (
        lambda document: document["costs"].update(lora=3),
        "- costs.lora: is the number 3, not an object",
    ),
    "another format": (
        changed(format="peft"),
        '- is not a comparison: it has no "format": "lorary-comparison"\n      hint: name the file that compare wrote',
    ),
    "a later version": (
        changed(version=2),
        "- version: is 2; this version reads 1\n      hint: update lorary, or compare again",
    ),
    "no arms": (dropped("arms"), "- arms: is missing"),
    "an unknown field": (changed(trails=[]), "- trails: is unknown\n      hint: did you mean `trials` or `task`?"),
    "an unknown task": (changed(task="dpo"), "- task: is 'dpo', not 'sft' or 'classification'"),
    "arms that are no list": (changed(arms={}), "- arms: is an object, not a list"),
    "a step that is a text": (trial(0, steps="9"), "- trials[0].steps: is a text, not a whole number"),
    "a step that is a truth": (trial(0, steps=True), "- trials[0].steps: is true or false, not a whole number"),
    "a step with a fraction": (trial(0, steps=1.5), "- trials[0].steps: is the number 1.5, not a whole number"),
    "a point with three numbers": (trial(0, curve=[[0, 1.0, 2]]), "- trials[0].curve[0]: is a list of 3, not of 2"),
    "a loss in words": (trial(0, curve=[[0, "low"]]), "- trials[0].curve[0][1]: is a text, not a number"),
    "another ending": (
        trial(0, ending="tired"),
        "- trials[0].ending: is 'tired', not 'finished' or 'diverged' or 'hopeless'",
    ),
    "a trial of nobody": (
        trial(2, arm="lorra"),
        "- trials[2].arm: no method is named 'lorra'\n      hint: did you mean `lora`?",
    ),
    "a rate below zero": (trial(0, lr=-1.0), "- trials[0].lr: is -1.0, not a positive number"),
    "scores of other lengths": (
        scored(right=[1]),
        "- trials[1].test: has 3 nats, 3 tokens and 1 right: not one of each for every row",
    ),
    "no rows": (
        scored(right=[], nats=[], tokens=[]),
        "- trials[1].test: has 0 nats, 0 tokens and 0 right: not one of each for every row",
    ),
    "a row without tokens": (scored(tokens=[1, 0, 1], right=[0, 0, 0]), "- trials[1].test.tokens: a row has 0 tokens"),
    "more right than tokens": (
        scored(right=[1, 99, 1]),
        "- trials[1].test.right: a row has more right tokens than tokens, or fewer than none",
    ),
    "a negative cross entropy": (
        scored(nats=[1, -2, 1]),
        "- trials[1].test.nats: a row has a cross entropy of -2",
    ),
    "the cost of nobody": (
        lambda document: document["costs"].update(dora=document["costs"]["lora"]),
        "- costs.dora: no method has this name\n      hint: did you mean `lora`?",
    ),
    "a negative cost": (
        lambda document: document["costs"]["lora"].update(file_bytes=-1),
        "- costs.lora: a count or a time is negative or not finite",
    ),
    "a negative time of a forward pass": (
        lambda document: document["costs"]["lora"].update(forward=[1.0, -0.5]),
        "- costs.lora: a count or a time is negative or not finite",
    ),
    "a time of a forward pass that is not finite": (
        lambda document: document["costs"]["lora"].update(merged_forward=["inf"]),
        "- costs.lora: a count or a time is negative or not finite",
    ),
    "one time instead of a list": (
        lambda document: document["costs"]["lora"].update(forward=1.5),
        "- costs.lora.forward: is the number 1.5, not a list",
    ),
    "a time in words": (
        lambda document: document["costs"]["lora"].update(merged_forward=["fast"]),
        "- costs.lora.merged_forward[0]: is a text, not a number",
    ),
    "two of one name": (
        lambda document: document["arms"].append(document["arms"][0]),
        "- arms[1].name: 'lora' is the name of an earlier one",
    ),
    "a name that cannot be printed": (
        lambda document: document["arms"].append({**document["arms"][0], "name": "a\x1b[31m"}),
        "- arms[1].name: is 'a\\x1b[31m': a name has characters, all of them printable",
    ),
    "a rate of nothing": (
        lambda document: document["arms"][0].update(rates=["nan"]),
        "- arms[0].rates: a learning rate is not a positive number",
    ),
    "a run twice": (
        lambda document: document["trials"].append(document["trials"][2]),
        "- trials[4]: is the run of trials[2], which would count twice",
    ),
    "a folder elsewhere": (
        trial(0, folder="../../other"),
        "- trials[0].folder: is '../../other', outside of the comparison's",
    ),
    "a folder of the system": (trial(0, folder="/etc"), "- trials[0].folder: is '/etc', outside of the comparison's"),
    "a time in words before": (setting(seconds="long"), "- settings.seconds: is a text, not a number"),
    "a time below zero": (setting(seconds=-5.0), "- settings.seconds: is -5.0, not a time"),
    "no end of time": (setting(seconds="inf"), "- settings.seconds: is 'inf', not a time"),
    "digests that are a number": (setting(digests=5), "- settings.digests: is the number 5, not an object"),
    "a digest that is a number": (setting(digests={"test": 5}), "- settings.digests.test: is the number 5, not a text"),
    "timings that are a list": (setting(timings=[1]), "- settings.timings: is a list, not an object"),
    "a request that is a text": (setting(request="again"), "- settings.request: is a text, not an object"),
    "a reference that is a number": (setting(reference=5), "- settings.reference: is the number 5, not a text"),
    "notes that are a text": (setting(notes="none"), "- settings.notes: is a text, not a list"),
    "a hostile name": (changed(**{"\x1b[31m\u202e": 1}), "- '\\x1b[31m\\u202e': is unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str, path: Path) -> None:
    document = written(path)
    change, sentence = WRONG[name]
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value) == f"cannot read the comparison {str(path)!r}:\n  {sentence}"


def test_all_reasons_at_once(path: Path) -> None:
    document = written(path)
    document["task"] = 7
    del document["arms"], document["trials"][0]["lr"]
    path.write_text(json.dumps(document))
    with pytest.raises(FileError) as caught:
        read(path)
    assert {problem.where for problem in caught.value.problems} == {"task", "arms", "trials[0].lr"}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "comparison.json: not JSON: expecting value (column 1)"),
        (b"[1]", 'is not a comparison: it has no "format": "lorary-comparison"'),
        (b'{"format": 1, "format": 2}', "comparison.json: the key 'format' appears twice"),
        (b'{"format": NaN}', "comparison.json: NaN is not a JSON number"),
        (b"\xff", "comparison.json: not UTF-8: byte 0xff at offset 0"),
        (b"[" * 100_000, "comparison.json: nested too deeply"),
    ],
)
def test_damaged(data: bytes, sentence: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(FileError) as caught:
        read(path)
    assert sentence in str(caught.value)


def test_truncated_anywhere(path: Path) -> None:
    written(path)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="not JSON"):
            read(path)


def test_places_that_are_no_file(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileError, match=r"comparison\.json: is missing"):
        read(path)
    with pytest.raises(FileError, match="the path cannot be followed"):
        read(tmp_path / "nowhere" / "comparison.json")
    path.mkdir()
    with pytest.raises(FileError, match="is a folder, not a plain file"):
        read(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a named pipe, not a plain file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (Comparison({}, "sft", (Arm("a", {}, (1.0,)), Arm("a", {}, (1.0,)))), "'a' is the name of an earlier one"),
        (Comparison({"where": Path()}, "sft", ()), "JSON cannot hold it: Object of type PosixPath"),
        (Comparison({}, "sft", (), (Trial("x", 1.0, 0, 0, ()),)), "trials[0].arm: no method is named 'x'"),
    ],
)
def test_what_no_reader_takes_is_not_written(record: Comparison, sentence: str, path: Path) -> None:
    path.write_text("old")
    with pytest.raises(FileError) as caught:
        write(record, path)
    assert sentence in str(caught.value)
    assert path.read_text() == "old"
    assert [*path.parent.iterdir()] == [path]
