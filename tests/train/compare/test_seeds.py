"""The seeds of a comparison: one order of the data for all arms, an initialisation for each; and what that shows.

Two arms of one method under two names are a null test. They, a planted worse and a planted better one are judged here
once, on a tiny Llama; `benchmarks/null_test.py` repeats that twenty times on the built-in base.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.adapter import Adapter
from lorary.analysis.comparison import store
from lorary.analysis.comparison.record import Arm, Comparison, Trial
from lorary.analysis.comparison.statistics import findings
from lorary.analysis.comparison.tables import runs
from lorary.errors import ConfigError
from lorary.train.compare.bench import Bench
from lorary.train.compare.request import make_request
from lorary.train.compare.search import init_seed
from lorary.train.config.load import from_dict, load
from lorary.train.runner.build import build_model, build_trainer
from lorary.train.runner.run import run as train
from tests.train.compare.tiny import compared, quick, tree
from tests.train.runs import WORDS

RATES = (1e-2,)
LORA = Arm("lora", {"name": "lora", "r": 2}, RATES)
AGAIN = Arm("the same", LORA.method, RATES)
WORSE = Arm("its rate ÷ 100", LORA.method, (1e-4,))
SMALL = Arm("q alone", {"name": "lora", "r": 1, "targets": "q_proj"}, RATES)
LEARNT = {"seeds": 2, "halving": False}


@pytest.fixture(autouse=True, scope="module")
def _one_turn() -> Any:
    """Steps are timed in one turn instead of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorary.train.compare.course.TURNS", 1)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture(scope="module")
def words(place: Path) -> dict[str, Any]:
    """Twelve steps on sixty questions, half of them held out."""
    found = tree(place)
    asked = [{"prompt": f"{WORDS[i % 7]} {WORDS[i % 5]}", "completion": f" {WORDS[i % 3]} {i}"} for i in range(60)]
    Path(found["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in asked))
    found["training"] |= {"max_steps": 12}
    return found


@pytest.fixture(scope="module")
def whole(place: Path, words: dict[str, Any]) -> Comparison:
    return compared(words, place, LORA, AGAIN, WORSE, SMALL, settings=quick(place, **LEARNT))


def verdicts(comparison: Comparison, reference: str) -> dict[str, str]:
    return {name: found.verdict for name, found in findings(comparison, reference).against_reference.items()}


def test_null_worse_and_better(whole: Comparison) -> None:
    assert verdicts(whole, "lora") == {"the same": "no difference shown", WORSE.name: "worse", SMALL.name: "worse"}
    assert verdicts(whole, SMALL.name) | {WORSE.name: ""} == {"lora": "better", "the same": "better", WORSE.name: ""}


def test_two_arms_have_the_order_in_common_and_not_the_start(words: dict[str, Any], place: Path) -> None:
    bench = Bench(make_request(from_dict(words), (LORA, AGAIN), quick(place), place / "elsewhere"))
    orders, starts = [], []
    for arm in (LORA, AGAIN):
        plan = bench.run_plan(arm, 1e-2, 43, arm.name)
        model = build_model(plan)
        trainer = build_trainer(plan, model, place / "elsewhere", resumed=False, callbacks=[])
        orders.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
        trainer.head.remove()
        starts.append(Adapter.of(model).tensors)
    assert orders[0] == orders[1]
    a, b = ([tensors["A"] for tensors in start.values()] for start in starts)
    assert not any(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_the_seeds_are_recorded_and_shown(whole: Comparison, place: Path) -> None:
    for trial in whole.trials:
        config = load(place / "comparison" / trial.folder / "config.resolved.yaml")
        assert (config.training.data_seed, config.training.seed) == (trial.seed, trial.init_seed)
        assert trial.init_seed == init_seed(trial.arm, trial.seed)
    assert len({trial.init_seed for trial in whole.trials}) == 4 * 3
    assert len({trial.seed for trial in whole.trials}) == 3
    first = whole.trials[0]
    assert runs(findings(whole)).rows[0][2:4] == (str(first.seed), str(first.init_seed))
    older = replace(whole, trials=(replace(first, init_seed=None),))
    assert runs(findings(older)).rows[0][2:4] == (str(first.seed), str(first.seed))


def test_other_arms_change_nothing_and_a_repeated_comparison_is_equal_bit_for_bit(
    whole: Comparison, words: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    arms = replace(AGAIN, name="new"), LORA
    other = compared(words, tmp_path, *arms, settings=quick(place, **LEARNT))
    assert [*map(unplaced, other.of("lora"))] == [*map(unplaced, whole.of("lora"))]
    for one, two in zip(other.of("lora"), whole.of("lora"), strict=True):
        first, second = (
            folder / trial.folder / "adapter" / "adapter_model.safetensors"
            for folder, trial in ((tmp_path / "comparison", one), (place / "comparison", two))
        )
        assert first.read_bytes() == second.read_bytes()


def unplaced(trial: Trial) -> Trial:
    """The run without its folder, which has the number of its arm."""
    return replace(trial, folder="")


def test_a_run_of_a_comparison_is_repeated_by_its_configuration(whole: Comparison, place: Path, tmp_path: Path) -> None:
    folder = place / "comparison" / next(trial.folder for trial in whole.of("the same") if trial.test)
    train(load(folder / "config.resolved.yaml", [f"output={tmp_path / 'out'}"]), quiet=True)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


def test_a_comparison_whose_arms_began_alike_does_not_go_on(place: Path, words: dict[str, Any], tmp_path: Path) -> None:
    """As one of an earlier version; it can still be shown."""
    found = compared(words, tmp_path, LORA, settings=quick(place))
    file = tmp_path / "comparison" / "comparison.json"
    request = {key: value for key, value in found.settings["request"].items() if key != "starts"}
    store.write(replace(found, settings={**found.settings, "request": request}), file)
    before = file.read_bytes()
    with pytest.raises(ConfigError) as error:
        compared(words, tmp_path, LORA, settings=quick(place))
    assert str(error.value) == (
        "the folder holds another comparison:\n"
        "  - starts: None in the folder, 'of each arm' here\n"
        "      hint: an earlier version began it: pass overwrite, or name another folder"
    )
    assert file.read_bytes() == before


def test_the_order_of_a_run_has_its_own_seed(words: dict[str, Any], tmp_path: Path) -> None:
    """And a run goes on with no other."""
    trained = words["training"] | {"data_seed": 7, "eval_steps": None, "save_steps": 12}
    config = from_dict(words | {"training": trained, "output": str(tmp_path / "out")})
    train(config, quiet=True)
    assert "42; 7 of the order of the rows" in (tmp_path / "out" / "README.md").read_text()
    trained["data_seed"] = 8
    with pytest.raises(ConfigError) as error:
        train(from_dict(words | {"training": trained, "output": str(tmp_path / "out")}), resume=True, quiet=True)
    assert str(error.value) == (
        "the folder belongs to another run:\n"
        "  - training.data_seed: 7 in the run, 8 here\n"
        "      hint: resume with the run's own configuration"
    )


def test_a_comparison_sets_the_seed_of_the_order_itself(words: dict[str, Any], place: Path, tmp_path: Path) -> None:
    config = from_dict(words | {"training": words["training"] | {"data_seed": 7}})
    with pytest.raises(ConfigError) as error:
        make_request(config, (LORA,), quick(place), tmp_path / "comparison")
    assert str(error.value) == (
        "cannot compare:\n"
        "  - training.data_seed: a comparison sets it for each of its runs, from training.seed\n"
        "      hint: remove it, or set training.seed"
    )
