"""Bad days of a comparison: damaged folders, no memory, a clock that is set back, rows that are not unseen."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.analysis.comparison.record import Arm, Comparison
from lorary.analysis.comparison.statistics import findings
from lorary.analysis.comparison.words import remarks
from lorary.analysis.evaluation import score_labels
from lorary.errors import FileError, TrainingError
from lorary.train.compare import bench
from lorary.train.compare.bench import Bench, run_name
from lorary.train.compare.compare import compare, prepare_comparison, run_comparison
from lorary.train.compare.request import make_request
from lorary.train.compare.timing import Timing
from lorary.train.config.load import from_dict
from tests.train.compare.tiny import LORA, quick, tree
from tests.train.tasks import rows as rows_file
from tests.train.tasks import saved

ONE = dataclasses.replace(LORA, rates=(1e-2,))
MEMORY = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)


@pytest.fixture(autouse=True, scope="module")
def _one_turn() -> Iterator[None]:
    """Steps are timed in one turn instead of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorary.train.compare.course.TURNS", 1)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-days")


@pytest.fixture(scope="module")
def words(place: Path) -> dict[str, Any]:
    return tree(place)


@pytest.fixture(scope="module")
def whole(place: Path, words: dict[str, Any]) -> Comparison:
    """A comparison within a budget, while the machine's clock goes back by a day at every look."""
    days, now = count(), time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 86_400 * next(days))
        return compare(from_dict(words), (ONE,), quick(place, budget=3600.0), place / "comparison")


Change = Callable[[dict[str, Any]], object]


def copied(place: Path, folder: Path, change: Change) -> Path:
    """The folder of the comparison, with a changed record."""
    shutil.copytree(place / "comparison", folder)
    document = json.loads((folder / "comparison.json").read_text())
    change(document)
    (folder / "comparison.json").write_text(json.dumps(document))
    return folder


def test_a_clock_that_is_set_back_moves_no_budget(whole: Comparison) -> None:
    assert 0 < whole.settings["seconds"] < 3600
    assert whole.left_out == {}
    assert [trial.ending for trial in whole.trials] == ["finished"] * 2


def test_a_signal_in_the_last_step_of_a_run_stops_the_comparison(
    words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """The run comes to its end, which no signal could bring nearer; the next one does not begin."""

    def stop(**told: Any) -> None:
        if told.get("completed") == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    two = dataclasses.replace(ONE, rates=(1e-3, 1e-2))
    found = compare(from_dict(words), (two,), quick(place), tmp_path / "c", progress=stop)
    assert [(trial.steps, trial.ending) for trial in found.trials] == [(6, "finished")]
    assert found.left_out == {"lora": "stopped: signal 15; called again, the comparison goes on"}


def test_rates_that_are_close_have_folders_of_their_own(words: dict[str, Any], place: Path) -> None:
    rates = (1e-2, 1.0000001e-2, 1.0000002e-2)
    request = make_request(from_dict(words), (dataclasses.replace(LORA, rates=rates),), quick(place), place / "no")
    names = [run_name(request, "lora", rate, 42) for rate in rates]
    assert names == [f"runs/01-lora/lr-{rate}-seed-42" for rate in ("0.01", "0.010000001", "0.010000002")]


# --- damaged folders --------------------------------------------------------------------------------------------------


def test_costs_that_cannot_be_measured_are_left_out(
    whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Here because the adapter is gone: what has been measured before is still shown."""
    folder = copied(place, tmp_path / "c", lambda document: document.update(costs={}))
    shutil.rmtree(folder / "runs")
    found = compare(from_dict(words), (ONE,), quick(place), folder)
    assert found.trials == whole.trials
    assert found.costs == {}
    assert list(found.left_out) == ["lora"]
    assert found.left_out["lora"].startswith("its costs: cannot load the adapter ")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda text: "", "metrics.jsonl: ends at step 0 of 6, and the run has come to its end"),
        (lambda text: "".join(text.splitlines(True)[:1]) + '{"step": 1, "ev', "metrics.jsonl: ends at step 0 of 6"),
        (
            lambda text: text.replace('"eval_loss": ', '"eval_loss": "low", "was": '),
            "metrics.jsonl: ends at step 0 of 6",
        ),
    ],
    ids=["empty", "cut", "words"],
)
def test_a_run_whose_log_is_damaged_is_not_judged(
    whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path, spoil: Any, sentence: str
) -> None:
    """It has come to its end, and the comparison was killed before it was recorded."""
    folder = copied(place, tmp_path / "c", lambda document: document.update(costs={}, trials=[]))
    for log in folder.rglob("metrics.jsonl"):
        log.write_text(spoil(log.read_text()))
    found = compare(from_dict(words), (ONE,), quick(place), folder)
    assert (found.trials, found.costs, list(found.left_out)) == ((), {}, ["lora"])
    why = found.left_out["lora"]
    assert why.startswith("lora at 0.01, seed 42: a run of the comparison is damaged:\n  - " + sentence)
    assert why.endswith(f"hint: remove {folder / whole.trials[0].folder}, and compare again")


@pytest.mark.parametrize(
    "timing", [{}, {"setup": 1}, {"setup": 1, "steps": [], "evaluation": 0, "peak": 0}, {"setup": "1", "steps": [1]}]
)
def test_timings_that_are_none_are_measured_again(timing: dict[str, Any]) -> None:
    good = {"setup": 1.0, "steps": [0.5, 1.5], "evaluation": 0.25, "peak": 7}
    assert Timing.from_record(good) == Timing(1.0, (0.5, 1.5), 0.25, 7)
    assert Timing.from_record(timing) is None
    assert Timing.from_record(good | {"setup": -1.0}) is None
    assert Timing.from_record(good | {"more": 1}) is None


def test_a_file_in_the_place_of_the_runs(whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    folder = copied(place, tmp_path / "c", lambda document: document.update(costs={}, trials=[]))
    shutil.rmtree(folder / "runs")
    (folder / "runs").write_text("mine")
    found = compare(from_dict(words), (ONE,), quick(place), folder)
    assert found.left_out["lora"].startswith("lora at 0.01, seed 42: cannot write ")
    assert (folder / "runs").read_text() == "mine"


def test_a_folder_below_a_file(words: dict[str, Any], place: Path) -> None:
    (place / "file").write_text("mine")
    with pytest.raises(FileError, match=r"cannot write '.*file/c'.*\n  - not a directory"):
        compare(from_dict(words), (ONE,), quick(place), place / "file" / "c")
    assert (place / "file").read_text() == "mine"


# --- no memory, no numbers --------------------------------------------------------------------------------------------


def test_an_arm_without_memory_is_left_out_and_the_others_go_on(
    words: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are; also: some of the rows are trained on, and judged on twice."""
    own = Bench.scored

    def scored(self: Bench, folder: str | None) -> Any:
        if folder and "large" in folder:
            raise RuntimeError(f"{MEMORY} 8 bytes.")
        return own(self, folder)

    monkeypatch.setattr(Bench, "scored", scored)
    lines = Path(words["data"]["train"]).read_text().splitlines()
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join([*lines[:3], lines[0], *lines[3:7]]) + "\n")
    data = {k: v for k, v in words["data"].items() if k != "validation_split"} | {"validation": str(held_out)}
    arms = ONE, Arm("large", {"name": "lora", "r": 4}, (1e-2,))
    found = compare(from_dict(words | {"data": data}), arms, quick(place), tmp_path / "c")
    assert [trial.arm for trial in found.trials if trial.test] == ["lora"]
    assert list(found.costs) == ["lora"]
    assert found.left_out == {
        "large": "large at 0.01, seed 43: out of memory: DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes."
    }
    notes = [
        "4 of the 4 rows on which methods are judged are also trained on: their scores mean nothing",
        "1 of the 4 rows on which methods are judged are also among those on which rates are chosen",
    ]
    assert found.settings["notes"] == notes
    assert [*remarks(findings(found))][:2] == [f"{note}." for note in notes]


def test_a_base_that_does_not_fit_into_memory(
    words: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(bench, "score_rows", none)
    with pytest.raises(TrainingError) as error:
        compare(from_dict(words), (ONE,), quick(place), tmp_path / "c")
    assert str(error.value) == (
        "the base cannot be scored:\n  - memory: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
        "      hint: set training.eval_batch_size to a smaller one"
    )


def test_a_base_without_finite_losses(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    shutil.copytree(words["model"], tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(TrainingError) as error:
        compare(from_dict(words | {"model": str(tmp_path / "base")}), (ONE,), quick(place), tmp_path / "c")
    assert str(error.value) == (
        "nothing can be compared on this base:\n"
        "  - model: gives 6 of 6 test rows a loss that is not finite\n"
        "      hint: is its checkpoint damaged, or model.dtype too narrow for it?"
    )


@pytest.mark.parametrize("padding", [None, 5], ids=["none", "another"])
def test_a_decoder_that_classifies_is_scored_as_it_is_trained(padding: int | None, tmp_path: Path) -> None:
    """Its configuration names no token that pads, or another than the tokenizer's, which training goes by."""
    texts = [f"a {'fine' if i % 2 else 'poor'} book" + " of words" * (i % 4) for i in range(16)]
    labelled = [{"text": text, "label": "good" if "fine" in text else "bad"} for text in texts]
    base = saved(tmp_path, "LlamaForCausalLM", pad_token_id=padding, eos_token_id=7)
    data = {"train": rows_file(tmp_path, labelled), "validation_split": 0.5, "max_length": 32}
    training = {"max_steps": 2, "batch_size": 4, "gradient_accumulation_steps": 1, "lr": 1e-2}
    words = {"model": base, "task": "classification", "data": data, "training": training}
    ready = prepare_comparison(from_dict(words), (ONE,), quick(tmp_path), tmp_path / "c")
    judged = next(trial for trial in run_comparison(ready).comparison.trials if trial.test)
    model, rows = ready.bench.trained(f"{judged.folder}/adapter"), ready.bench.held_out.validation.rows
    assert len({len(row["input_ids"]) for row in rows}) > 1
    pad = ready.bench.any_plan.tokenizer.pad_token_id
    assert pad not in (padding, 7)
    assert score_labels(model, rows, batch_size=4, pad=pad).loss == pytest.approx(judged.curve[-1][1], rel=1e-4)
