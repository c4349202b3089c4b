"""Whole comparisons: the search, the rows that no choice sees, kills, signals, budgets, workers, costs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorary.adapters import load_adapter
from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm, Comparison
from lorary.train.compare import course
from lorary.train.compare.bench import Bench, spread
from lorary.train.compare.compare import compare, prepare_comparison
from lorary.train.compare.latency import PASSES, over_base
from lorary.train.compare.request import Request, make_request
from lorary.train.compare.search import best_trial
from lorary.train.config.load import from_dict
from tests.train.compare.tiny import LORA, compared, quick, timeless, tree
from tests.train.resume.processes import child
from tests.train.tasks import LABELLED, saved
from tests.train.tasks import rows as rows_file

DORA = Arm("dora", {"name": "dora", "r": 2}, (1e-3, 1e-2, 3e-2))
BAD = Arm("lora, its rate ÷ 100", {"name": "lora", "r": 2}, (1e-5, 1e-4, 3e-4))


@pytest.fixture(autouse=True, scope="module")
def _one_turn() -> Iterator[None]:
    """Steps are timed in one turn instead of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorary.train.compare.course.TURNS", 1)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def words(place: Path) -> dict[str, Any]:
    return tree(place)


@pytest.fixture(scope="module")
def whole(place: Path, words: dict[str, Any]) -> Comparison:
    """Plain LoRA and a planted worse one."""
    return compared(words, place, LORA, BAD)


def test_every_arm_gets_the_same_search_and_its_best_rate_is_judged(whole: Comparison) -> None:
    for arm in whole.arms:
        search = [trial for trial in whole.of(arm.name) if trial.seed == 42]
        judged = [trial for trial in whole.of(arm.name) if trial.seed != 42]
        assert {trial.lr for trial in search} == set(arm.rates)
        assert all(trial.test is None and trial.general is None for trial in search)
        best = best_trial(search)
        assert best is not None
        assert [(trial.lr, trial.seed, trial.steps, trial.ending) for trial in judged] == [(best.lr, 43, 6, "finished")]
        assert all(trial.curve[0][0] == 0 and trial.curve[0][1] == whole.trials[0].curve[0][1] for trial in search)


def test_the_planted_worse_method_is_found(whole: Comparison) -> None:
    good, bad = (next(t.test for t in whole.of(name) if t.test) for name in ("lora", BAD.name))
    assert whole.base_test is not None
    assert good.loss < bad.loss - 0.05
    assert good.tokens == bad.tokens == whole.base_test.tokens
    assert bad.loss < whole.base_test.loss


def test_a_hopeless_rate_stops_after_a_third(whole: Comparison) -> None:
    """1e-3 makes no half of the progress of 1e-2, the centre; nothing was scored or saved twice."""
    slow = next(trial for trial in whole.of("lora") if trial.lr == 1e-3)
    assert (slow.ending, slow.steps, [step for step, _ in slow.curve]) == ("hopeless", 2, [0, 1, 2])


def test_the_costs(whole: Comparison, place: Path) -> None:
    cost = whole.costs["lora"]
    folder = place / "comparison" / next(trial.folder for trial in whole.of("lora") if trial.test) / "adapter"
    assert cost.trained == sum(t.numel() for site in load_adapter(folder).tensors.values() for t in site.values())
    assert cost.file_bytes >= cost.trained * 4
    assert len(cost.step_seconds) == 4
    assert cost.peak_bytes > 4 * cost.trained
    assert cost.merge == "to rounding"
    assert len(cost.forward) == len(cost.merged_forward) == PASSES
    assert min(cost.forward + cost.merged_forward) > 0
    assert cost.engines["peft"] == cost.engines["vllm"] == ""
    assert cost.context == 0
    assert whole.costs[BAD.name].trained == cost.trained


def test_a_forward_pass_is_timed_over_the_bases() -> None:
    class Slow(nn.Module):
        device = torch.device("cpu")

        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, input_ids: torch.Tensor) -> None:
            time.sleep(self.seconds)

    assert statistics.median(over_base(Slow(0.001), Slow(0.01), [1, 2])) > 2


def test_a_signal_while_the_costs_are_counted_stops_it(
    words: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = course.cost

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return counted(*arguments)

    monkeypatch.setattr(course, "cost", interrupted)
    found = compared(words, tmp_path, LORA, DORA, settings=quick(place))
    assert found.costs == {}
    monkeypatch.undo()
    again = compared(words, tmp_path, LORA, DORA, settings=quick(place))
    assert [*again.costs] == ["lora", "dora"]
    assert again.trials == found.trials


def test_what_is_needed_to_repeat_it_is_recorded(whole: Comparison, place: Path) -> None:
    s = whole.settings
    assert (s["steps"], s["search_seed"], s["judged_seeds"]) == (6, 42, [43])
    assert s["rows"] == {"training": 12, "validation": 6, "test": 6, "general": 6}
    assert len({*s["digests"].values()}) == 4
    folder = place / "comparison" / whole.trials[0].folder / "adapter"
    assert s["base"]["weights"] == load_adapter(folder).base.weights
    assert "torch" in s["environment"]["packages"]
    assert store.read(place / "comparison" / "comparison.json") == whole


def test_called_again_nothing_is_trained(whole: Comparison, place: Path, words: dict[str, Any]) -> None:
    runs = place / "comparison" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    again = compared(words, place, LORA, BAD)
    assert timeless(again) == timeless(whole)
    assert again.costs == whole.costs
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


def test_killed_and_started_again_it_equals_one_that_is_not(
    whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Killed in its first run, in the second round of the search and in a judged run; what is done is not repeated."""
    steps, told = sum(trial.steps for trial in whole.trials), Told()

    def kill_at(step: int, **told: Any) -> None:
        if told.get("completed") == step:
            os.kill(os.getpid(), signal.SIGKILL)

    request = from_dict(words), (LORA, BAD), quick(place), tmp_path / "comparison"
    for step in (5, 12, 16):
        pid = child(lambda: compare(*request, progress=functools.partial(kill_at, step)))  # noqa: B023
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    again = compare(*request, progress=told)
    assert timeless(again) == timeless(whole)
    assert told.end() <= steps - 5 - 12 - 16 + 3 * 2  # a kill costs a third of a run at most


def test_a_signal_stops_it_cleanly_and_says_so(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    def stop(**told: Any) -> None:
        if told.get("completed") == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    partial = compare(from_dict(words), (LORA, BAD), quick(place), tmp_path / "comparison", progress=stop)
    why = "stopped: signal 15; called again, the comparison goes on"
    assert partial.left_out == {"lora": why, BAD.name: why}
    assert len(partial.trials) == 1
    assert store.read(tmp_path / "comparison" / "comparison.json").trials == partial.trials


def test_two_processes_give_the_same_numbers(
    whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    found = compare(from_dict(words), (LORA,), quick(place, workers=2), tmp_path / "comparison")
    assert list(found.trials) == whole.of("lora")
    assert (found.base_test, found.arms) == (whole.base_test, whole.arms[:1])


def test_test_rows_are_never_used_in_choosing(whole: Comparison, words: dict[str, Any], tmp_path: Path) -> None:
    """Other test rows, planted so that a choice by them would be another one, change nothing but the test scores."""
    lines = (Path(words["data"]["train"])).read_text().splitlines()
    bench = Bench(make_request(from_dict(words), (LORA,), quick(Path(words["model"]).parent), tmp_path))
    tokens = [row["input_ids"] for row in bench.held_out.test]
    planted = []
    for line in lines:
        row = json.loads(line)
        text = bench.any_plan.tokenizer(row["prompt"] + row["completion"])["input_ids"]
        is_test = any(ids[: len(text)] == text for ids in tokens)
        planted.append({**row, "completion": " the the the"} if is_test else row)
    assert sum(a != json.loads(b) for a, b in zip(planted, lines, strict=True)) == len(tokens)
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "hello world"}) + "\n")
    path = rows_file(tmp_path, planted)
    other = compared(words | {"data": words["data"] | {"train": path}}, tmp_path, LORA)
    assert other.settings["digests"]["test"] != whole.settings["digests"]["test"]
    for key in ("training", "validation"):
        assert other.settings["digests"][key] == whole.settings["digests"][key]
    runs = [dataclasses.replace(trial, test=None, general=None) for trial in other.trials]
    assert runs == [dataclasses.replace(trial, test=None, general=None) for trial in whole.of("lora")]
    assert [t.test for t in other.trials if t.test] != [t.test for t in whole.of("lora") if t.test]


def test_the_best_rate_at_the_edge_leads_further_out(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """One rate at a time, as often as `outward` says; without halving every run comes to its end."""
    arm = dataclasses.replace(LORA, rates=(1e-4, 1e-3))
    settings = quick(place, outward=1, halving=False, spacing=4.0)
    told = Told()
    found = compare(from_dict(words), (arm,), settings, tmp_path / "comparison", progress=told)
    assert found.arms[0].rates == (1e-4, 1e-3, 4e-3)
    assert {trial.ending for trial in found.trials} == {"finished"}
    assert [trial.lr for trial in found.trials if trial.test] == [4e-3]
    ready = prepare_comparison(from_dict(words), (arm,), settings, tmp_path / "comparison")
    assert (ready.request.runs, ready.runs_done) == (3, 3)
    assert told.end() == 4 * 6


class Told:
    """A `progress` that never passes its total."""

    def __init__(self) -> None:
        self.completed, self.total = 0, 0

    def __call__(self, description: str = "", completed: int = 0, total: int | None = None) -> None:
        self.completed, self.total = max(self.completed, completed), self.total if total is None else total
        assert self.completed <= self.total

    def end(self) -> int:
        """The steps done: all of the total."""
        assert self.completed == self.total
        return self.completed


def test_rates_further_out_fit_into_the_budget_for_every_method_or_for_none(
    words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Planned: 14,000 s, and 2,000 s for a round of two runs. Room for one of them alone is room for none."""

    def halt(description: str = "", **_: Any) -> None:
        if description == "the base":
            raise KeyboardInterrupt

    arms = [dataclasses.replace(arm, rates=(1e-4, 1e-3)) for arm in (LORA, DORA)]
    settings = quick(place, outward=2, halving=False, spacing=4.0, budget=15_600.0)
    request = from_dict(words), arms, settings, tmp_path / "comparison"
    with pytest.raises(KeyboardInterrupt):
        compare(*request, progress=halt)
    file = tmp_path / "comparison" / "comparison.json"
    record = store.read(file)
    timing = {"setup": 1000.0, "steps": [0.0], "evaluation": 0.0, "peak": 0}
    planned = {**record.settings, "timings": {"lora": timing, "dora": timing}}
    store.write(dataclasses.replace(record, settings=planned), file)
    found = compare(*request)
    assert found.settings["planned_seconds"] == 14_000
    why = "the budget has no room for rates further out"
    assert found.left_out == {"lora at 0.004": why, "dora at 0.004": why}
    assert [arm.rates for arm in found.arms] == [(1e-4, 1e-3)] * 2
    more = dataclasses.replace(settings, budget=16_500.0)
    found = compare(from_dict(words), arms, more, tmp_path / "comparison")
    assert found.left_out == {"lora at 0.016": why, "dora at 0.016": why}
    assert [arm.rates for arm in found.arms] == [(1e-4, 1e-3, 4e-3)] * 2


def test_arms_whose_rates_diverge_or_whose_runs_fail_are_left_out_with_the_reason(
    words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Delta-LoRA's weights follow from step 501 on, and these runs have 6 steps."""
    arms = Arm("full", {"name": "full"}, (0.5, 1.0)), Arm("late", {"name": "delta-lora", "r": 2}, (1e-3,))
    found = compare(from_dict(words), arms, quick(place), tmp_path / "comparison")
    assert [(trial.arm, trial.ending) for trial in found.trials] == [("full", "diverged")] * 2
    assert list(found.left_out) == ["late", "full"]
    assert found.left_out["late"].startswith("late at 0.001, seed 42: Delta-LoRA does not fit this run:\n  - rules: ")
    assert found.left_out["full"] == "every rate has diverged"
    assert found.costs == {}


def test_a_budget_is_kept_and_what_it_leaves_out_is_said(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Planned seconds are the machine's: a budget of an hour holds everything, one of a second nothing."""
    arm = dataclasses.replace(LORA, rates=(1e-2,))
    found = compare(from_dict(words), (arm,), quick(place, budget=3600.0), tmp_path / "comparison")
    assert found.left_out == {}
    assert set(found.settings["timings"]) == {"lora"}
    assert 0 < found.settings["planned_seconds"] < 3600
    assert found.settings["seconds"] > 0


def test_classification_is_compared_by_the_scores_of_labels(tmp_path: Path) -> None:
    data = {"train": rows_file(tmp_path, LABELLED), "validation_split": 0.5, "max_length": 32}
    training = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 1}
    words = {"model": saved(tmp_path, "BertModel"), "task": "classification", "data": data, "training": training}
    arms = Arm("lora", {"name": "lora", "r": 2}, (1e-2,)), Arm("bitfit", {"name": "bitfit"}, (1e-2,))
    found = compared(words, tmp_path, *arms, settings=quick(tmp_path))
    assert (found.task, found.base_test, found.base_general) == ("classification", None, None)
    assert found.settings["base"]["frozen"]  # the head is drawn again at every load
    assert compared(words, tmp_path, *arms, settings=quick(tmp_path)).trials == found.trials
    for name in ("lora", "bitfit"):
        judged = [trial for trial in found.of(name) if trial.test is not None]
        assert len(judged) == 1
        scores = judged[0].test
        assert scores is not None
        assert scores.tokens == (1,) * len(scores.nats)
        assert 0 <= scores.accuracy <= 1
        assert judged[0].general is None
        assert found.costs[name].peak_bytes > 0


@pytest.fixture
def request_of(words: dict[str, Any], place: Path) -> Any:
    def made(*arms: Arm, **settings: Any) -> Request:
        return make_request(from_dict(words), arms, quick(place, **settings), place / "elsewhere")

    return made


def test_the_centre_of_an_arm_is_its_own_and_follows_the_configuration(words: dict[str, Any], place: Path) -> None:
    """The configuration's LoRA trains at 1e-3, five times its default of 2e-4: so do all others."""
    arms = Arm("lora", {"name": "lora"}, ()), Arm("full", {"name": "full"}, ()), Arm("vera", {"name": "vera"}, ())
    given = make_request(from_dict(words), arms, quick(place), place / "elsewhere")
    plain = words | {"training": {k: v for k, v in words["training"].items() if k != "lr"}}
    own = make_request(from_dict(plain), arms, quick(place), place / "elsewhere")
    middle = [[arm.rates[1] for arm in request.arms] for request in (given, own)]
    assert middle[1][:2] == [2e-4, 2e-5]
    assert middle[0] == pytest.approx([5 * rate for rate in middle[1]])
    assert all(len(arm.rates) == 3 for arm in own.arms)


def test_held_out_rows_are_divided_by_examples(request_of: Any) -> None:
    held_out = Bench(request_of(LORA)).held_out
    validation, test = ([tuple(row["input_ids"]) for row in rows] for rows in (held_out.validation.rows, held_out.test))
    assert len(validation) == len(test) == 6
    assert not set(validation) & set(test)


def test_no_more_rows_than_asked_for(request_of: Any) -> None:
    held_out = Bench(request_of(LORA, validation_rows=2, test_rows=3, general_rows=1)).held_out
    assert [len(rows) for rows in (held_out.validation.rows, held_out.test, held_out.general)] == [2, 3, 1]
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread("abc", 5) == ["a", "b", "c"]
