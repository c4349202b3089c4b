"""`lorary compare`: a whole comparison, stopped, shown and gone on with; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorary.analysis.comparison import store
from lorary.cli._compare.results import columns_that_fit
from lorary.train.compare.asked import from_config
from lorary.train.compare.settings import Settings
from lorary.train.config.compare_section import CompareSection, one_arm
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump
from tests.cli.bad_comparisons import TABLE, Bad
from tests.cli.command import Command
from tests.cli.comparisons import fill
from tests.train.compare.tiny import timeless, tree
from tests.train.tasks import LABELLED, rows, saved

METHODS = "lora:r=2,slow=lora:r=2:rates=[1e-6,3e-6,1e-5]"
ASKED = ("--methods", METHODS, "--rates", "1e-3,1e-2,3e-2", "--seeds", "2", "--general", "general.jsonl")


@pytest.fixture
def config(tmp_path: Path, command: Command) -> Path:
    """A configuration whose runs take a second."""
    words = tree(tmp_path)
    words["compare"] = {"outward": 0, "halving": False}
    (tmp_path / "c.yaml").write_text(dump(words))
    return tmp_path / "c.yaml"


@contextmanager
def interrupted_at(runs: int, record: Path, number: int = signal.SIGINT) -> Iterator[None]:
    """Inside, this process gets Ctrl-C, or another signal, once so many runs are recorded."""

    def watch() -> None:
        while not over.wait(0.02):
            if record.is_file() and record.read_text().count('"ending"') >= runs:
                os.kill(os.getpid(), number)
                return

    over, thread = threading.Event(), threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_comparison_from_its_announcement_to_its_page(command: Command, config: Path) -> None:
    """Stopped once by Ctrl-C, it goes on; done, it is shown again."""
    out, record = config.parent / "comparison", config.parent / "comparison" / "comparison.json"
    shown = command("compare", "c.yaml", *ASKED, "--dry-run")
    assert shown.code == 0, shown.err
    assert not out.exists()
    lines = shown.out.splitlines()
    assert lines[0] == "To compare"
    assert lines[1].split() == ["method", "presets", "options", "learning", "rates"]
    assert lines[2].split() == ["lora:r=2", "lora", "r=2", "0.001", "0.01", "0.03"]
    assert lines[3].split() == ["slow", "lora", "r=2", "1e-06", "3e-06", "1e-05"]
    assert lines[5].startswith("data      ")
    assert lines[5].endswith(": 12 rows to train on, 6 to choose rates on, 6 to judge methods on, 6 of general text")
    assert lines[6] == ("runs      10 of 6 steps: every rate on one seed, and the best of each method on 2 seeds more")
    few = "only 6 rows judge the methods, which shows large differences alone: hold out more rows"
    assert lines[7:] == [f"note      {few}"]

    with interrupted_at(2, record):
        stopped = command("compare", "c.yaml", *ASKED)
    assert stopped.code == 130
    assert "note: stopped; the same command goes on, and so does: lorary compare comparison --resume" in stopped.err
    assert stopped.out == ""
    begun = store.read(record)
    assert 2 <= len(begun.trials) < 10
    half = command("compare", "comparison")
    assert half.code == 0, half.err
    assert "note: not finished: lora:r=2, slow; go on with: lorary compare comparison --resume" in half.err

    done = command("compare", "comparison", "--resume", "--budget", "2h")
    assert done.code == 0, done.err
    assert f"{len(begun.trials)} are done already" in done.err
    assert "lora:r=2 is better than slow: " in done.out
    assert done.out.splitlines()[-2:] == [
        "page    comparison/comparison.html",
        "record  comparison/comparison.json",
    ]
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "lora:r=2" in page
    assert "<script" not in page
    whole = store.read(record)
    assert [len(whole.of(arm)) for arm in ("lora:r=2", "slow")] == [5, 5]

    again = command("compare", "c.yaml", *ASKED)  # nothing is left to do
    assert again.code == 0, again.err
    assert timeless(store.read(record)).trials == whole.trials
    assert command("compare", "comparison").out == again.out == done.out

    other = command("compare", "comparison", "--reference", "slow", "--json")
    found = json.loads(other.out)
    assert found["finished"] is True
    assert found["reference"] == "slow"
    first, second = found["methods"]
    assert (first["name"], first["against_reference"]["verdict"]) == ("lora:r=2", "better")
    assert second["name"] == "slow"
    assert {found["page"], found["record"]} == {"comparison/comparison.html", "comparison/comparison.json"}


def test_sigterm_ends_it_as_ctrl_c_does(command: Command, config: Path) -> None:
    """And the same command goes on."""
    record = config.parent / "comparison" / "comparison.json"
    asked = ("c.yaml", "-m", "lora:r=2", *ASKED[2:4], "--seeds", "1", "--set", "compare.general=[]")
    with interrupted_at(1, record, signal.SIGTERM):
        stopped = command("compare", *asked)
    assert (stopped.code, stopped.out) == (143, "")
    assert stopped.err.splitlines()[-1] == (
        "note: stopped; the same command goes on, and so does: lorary compare comparison --resume"
    )
    begun = store.read(record).trials
    assert 1 <= len(begun) < 4
    done = command("compare", *asked)
    assert done.code == 0, done.err
    whole = store.read(record).trials
    assert set(begun) < set(whole)
    assert len(whole) == 4


def test_classifiers_are_compared_by_their_accuracy(command: Command, tmp_path: Path) -> None:
    """Accuracy with its interval, on the terminal, in JSON and on the page."""
    training = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 1}
    words: dict[str, object] = {"model": saved(tmp_path, "BertModel"), "task": "classification", "training": training}
    words["data"] = {"train": rows(tmp_path, LABELLED), "validation_split": 0.5, "max_length": 32}
    words["compare"] = {"outward": 0, "seeds": 2, "rates": [3e-3, 1e-2, 3e-2]}
    (tmp_path / "c.yaml").write_text(dump(words))
    done = command("compare", "c.yaml", "-m", "lora:r=2,bitfit", "--quiet")
    assert done.code == 0, done.err
    title, head, *lines = done.out.splitlines()
    assert (title, head.split()[:4]) == ("Comparison", ["method", "held-out", "loss", "accuracy"])
    assert "forgotten" not in head
    shown = {line.split()[0]: line for line in lines[:2]}
    for method in json.loads(command("compare", "comparison", "--json").out)["methods"]:
        low, value, high = (method["accuracy"][key] for key in ("low", "value", "high"))
        assert 0 <= low <= value <= high <= 1
        assert f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" in shown[method["name"]]
    page = (tmp_path / "comparison" / "comparison.html").read_text(encoding="utf-8")
    assert "Classifiers are judged by their accuracy" in page


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_a_request_that_is_refused_with_all_of_its_reasons(command: Command, tmp_path: Path, bad: Bad) -> None:
    fill(tmp_path, bad.text)
    before = sorted(tmp_path.rglob("*"))
    ran = command("compare", *bad.arguments)
    found = ran.err.replace(str(tmp_path), "FOLDER")
    assert found[found.index("error: ") :] == bad.message  # libraries may say something before
    assert (ran.code, ran.out) == (bad.code, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_results_are_shown_though_the_page_cannot_be_written(command: Command, tmp_path: Path) -> None:
    """Here of a comparison without any run."""
    fill(tmp_path)
    (tmp_path / "done" / "comparison.html").mkdir()
    os.utime(tmp_path / "done" / "comparison.html", (0, 0))
    shown = command("compare", "done")
    assert shown.code == 0, shown.err
    assert "note: not finished: lora, dora; go on with: lorary compare done --resume" in shown.err
    assert "note: the page was not written: " in shown.err
    assert "No method was judged on the test rows." in shown.out
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["comparison.html", "comparison.json"]


def test_ranks_of_equal_numbers_are_announced_and_what_has_none_is_named(command: Command, config: Path) -> None:
    """LoRA trains r (in + out) numbers for each layer, DoRA as many and `out` magnitudes."""
    shown = command("compare", "c.yaml", "-m", "lora:r=8,dora,full", "--match", "parameters", "--dry-run")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["lora:r=8", "lora", "r=8"],
        ["dora", "dora", "r=7"],  # r=8 is as near, and larger
        ["full", "full", "3.2e-05"],
    ]
    assert lines[-1] == "note      no rank changes how many numbers these train: full"
    assert not (config.parent / "comparison").exists()


def test_the_best_checkpoint_and_early_stopping_are_left_out_with_a_note(command: Command, config: Path) -> None:
    every = ["--set", "training.save_steps=null"]  # both want checkpoints where they evaluate
    for key, value in (("keep_best", "true"), ("early_stopping_patience", "2")):
        shown = command("compare", "c.yaml", *ASKED, "--set", f"training.{key}={value}", *every, "--dry-run")
        assert shown.code == 0, shown.err
        last = f"note      methods are judged after their last step: training.{key} left out"
        assert shown.out.splitlines()[-1] == last


def test_a_budget_for_less_than_one_run_is_refused_once_the_first_steps_are_measured(
    command: Command, config: Path
) -> None:
    ran = command("compare", "c.yaml", *ASKED, "--budget", "0.1s")
    assert ran.code == 2
    assert re.search(
        r"error: cannot compare:\n"
        r"  - budget: one rate and one seed of lora:r=2 alone take about \d+ s, the budget is 0 s\n"
        r"      hint: give it \d+ s or more, or fewer training.max_steps\n$",
        ran.err,
    )
    assert not (config.parent / "comparison").exists()


def test_there_are_many_of_them() -> None:
    assert len(TABLE) >= 50


def test_a_wide_table_is_shown_in_pieces_that_fit_the_terminal() -> None:
    lines = [["method", "loss", "a long name of a column", "verdict"], ["lora", "1.234", "1", "better"]]
    assert columns_that_fit(lines, 200) == [[0, 1, 2, 3]]
    assert columns_that_fit(lines, 48) == [[0, 1, 2], [0, 3]]
    assert columns_that_fit(lines, 10) == [[0, 1], [0, 2], [0, 3]]  # too narrow for any


# --- how methods are written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "method"),
    [
        ("lora", "lora", {"name": ["lora"]}),
        ("lora+", "lora+", {"name": ["lora+"]}),
        ("lora++dora", "lora++dora", {"name": ["lora+", "dora"]}),
        ("dora+lora+", "dora+lora+", {"name": ["dora", "lora+"]}),
        ("qlora + dora + rslora", "qlora + dora + rslora", {"name": ["qlora", "dora", "rslora"]}),
        ("wide=lora:r=64", "wide", {"name": ["lora"], "r": 64}),
        ("a=b=lora", "a", {"name": ["b=lora"]}),
        ("lora:targets=[q_proj, v_proj]", "lora:targets=[q_proj, v_proj]", {"targets": ["q_proj", "v_proj"]}),
        ("lora-drop", "lora-drop", {"name": ["lora"], "drop": {"threshold": 0.9}}),
        ("dora+lora-drop", "dora+lora-drop", {"name": ["dora"], "drop": {"threshold": 0.9}}),
    ],
)
def test_a_method_in_one_text(text: str, name: str, method: dict[str, object]) -> None:
    found = one_arm(text)
    assert found["name"] == name
    assert {key: found["method"][key] for key in method} == method


def asked(compare: object, **sections: object) -> list[tuple[str, dict[str, object], tuple[float, ...]]]:
    least = {"model": "builtin:base", "data": {"train": "builtin:docstrings", "validation_split": 0.5}}
    return [
        (a.name, dict(a.method), a.rates)
        for a in from_config(from_dict({**least, "compare": compare, **sections})).arms
    ]


def test_commas_separate_methods_but_not_inside_brackets() -> None:
    found = asked("lora:targets=[q_proj,v_proj]:rates=[1e-4,3e-4,1e-3],dora")
    assert [name for name, _, _ in found] == ["lora:targets=[q_proj,v_proj]:rates=[1e-4,3e-4,1e-3]", "dora"]
    assert found[0][1:] == ({"name": ["lora"], "targets": ["q_proj", "v_proj"]}, (1e-4, 3e-4, 1e-3))


def test_methods_as_keys_and_values() -> None:
    methods = [
        "pissa",
        {"name": "wide", "method": {"name": "lora", "r": 64}},
        {"method": "dora, rslora", "rates": "1e-4, 3e-4, 1e-3"},
        {"method": {"r": 8}},
    ]
    assert asked({"methods": methods}) == [
        ("pissa", {"name": ["pissa"]}, ()),
        ("wide", {"name": "lora", "r": 64}, ()),
        ("dora+rslora", {"name": ["dora", "rslora"]}, (1e-4, 3e-4, 1e-3)),
        ("lora", {"r": 8}, ()),
    ]


def test_rank_alpha_and_dropout_of_the_configuration_are_those_of_every_method_that_has_them() -> None:
    without = "ia3", "houlsby", "prefix-tuning", "prompt-tuning"
    names = ",".join(("lora,dora:r=4,vera,rslora,bitfit,pissa", *without))
    found = asked(names, method={"r": 8, "alpha": 16, "dropout": 0.1})
    both = {"r": 8, "alpha": 16, "dropout": 0.1}
    assert [method for _, method, _ in found] == [
        {"name": ["lora"], **both},
        {"name": ["dora"], **both, "r": 4},
        {"name": ["vera"], "r": 8, "dropout": 0.1},
        {"name": ["rslora"], **both},
        {"name": ["bitfit"]},
        {"name": ["pissa"], "r": 8, "alpha": 16},
        *({"name": [name]} for name in without),
    ]


def test_a_method_is_checked_beside_the_rows_of_the_configuration() -> None:
    data = {"train": "builtin:docstrings", "validation_split": 0.5, "max_length": 256}
    assert asked("longlora:length=512", data=data) == [
        ("longlora:length=512", {"name": ["longlora"], "length": 512}, ())
    ]


def test_the_rates_of_all_methods_but_those_that_have_their_own() -> None:
    found = asked({"methods": "lora,dora:rates=[1e-5,1e-4,1e-3]", "rates": [1e-4, 1e-3, 1e-2]})
    assert [rates for _, _, rates in found] == [(1e-4, 1e-3, 1e-2), (1e-5, 1e-4, 1e-3)]


def test_the_section_has_the_defaults_of_the_settings() -> None:
    section, settings = CompareSection().model_dump(), dataclasses.asdict(Settings())
    assert {key: section[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20min", 1200), ("1.5h", 5400), ("1h 30min", 5400), ("2 hours", 7200), ("1d", 86400)],
)
def test_times(text: str, seconds: float) -> None:
    assert CompareSection(budget=text).budget == seconds


def test_a_command_wins_over_the_section_and_a_run_has_none_of_it() -> None:
    least = {"model": "builtin:base", "data": "builtin:docstrings", "compare": {"methods": "lora", "seeds": 3}}
    config = from_dict(least, flags={"--seeds": ("compare.seeds", "5"), "--methods": ("compare.methods", "dora")})
    assert (config.compare.seeds, config.compare.names) == (5, ["dora"])
    assert "compare" not in config.record()
    assert config == from_dict({key: value for key, value in least.items() if key != "compare"})
