"""Two processes give the numbers of one: DDP and FSDP2 over gloo, launched as a user would."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.errors import TrainingError
from lorary.train.trainer.distributed import check_strategy
from tests.train.distributed_worker import MODES, from_configuration, train

ROOT = Path(__file__).parents[3]
FIELDS = ("loss", "eval_loss", "grad_norm", "learning_rate", "rewards/margins", "penalty", "rank_budget")


pytestmark = pytest.mark.xdist_group("distributed")  # one process: the fixture is a whole run


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found, mode by mode."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.train.distributed_worker", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {mode: json.loads((folder / f"{mode}.json").read_text()) for mode in (*MODES, "run", "refusal")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The same run in one process, once for all ways of dividing it."""
    return functools.cache(lambda name: train(tmp_path_factory.mktemp("one"), f"one-{name}", 1))


def _numbers(log: list[dict[str, Any]]) -> list[float]:
    return [record[key] for record in log for key in FIELDS if key in record]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(
    launched: dict[str, Any], alone: Callable[[str], dict[str, Any]], mode: str
) -> None:
    two = launched[mode]
    one = alone("-".join(part for part in mode.split("-") if part not in ("ddp", "fsdp")))
    assert (two["sharded"] > 40) is ("fsdp" in mode)
    assert _numbers(two["log"]) == pytest.approx(_numbers(one["log"]), rel=1e-5, abs=1e-5)
    assert len(_numbers(one["log"])) > 8
    assert two["figures"] == one["figures"], "the same directions are left"
    if "adalora" in mode:
        assert one["figures"]["rank_budget"] == 2 * len(one["figures"]["ranks"]), "half of them have gone"
    if "o-lora" in mode and "hard" not in mode:
        assert all(record["penalty"] > 0.1 for record in one["log"] if "loss" in record)
    assert two["adapter"].keys() == one["adapter"].keys()
    for name, values in one["adapter"].items():
        for mine, theirs in zip(values, two["adapter"][name], strict=True):
            assert theirs == pytest.approx(mine, abs=1e-4)
    if "resumed" in two:  # bit for bit
        for run in (one, two):
            assert run["resumed"] == {name: run[name] for name in ("log", "adapter", "figures")}


@pytest.mark.slow
def test_a_configuration_runs_in_two_processes_as_in_one(tmp_path: Path, launched: dict[str, Any]) -> None:
    one, two = from_configuration(tmp_path, 4), launched["run"]
    assert _numbers(two["history"]) == pytest.approx(_numbers(one["history"]), rel=1e-5, abs=1e-5)
    assert len([r for r in one["history"] if "loss" in r]) == 3
    assert two["probe"]["shares"] == one["probe"]["shares"], "both chose the same layers"
    assert "" in two["probe"]["shares"].values()
    assert two["probe"]["tokens"] == one["probe"]["tokens"]
    for site, figures in one["probe"]["sites"].items():
        assert two["probe"]["sites"][site] == pytest.approx(figures, rel=1e-3)


@pytest.mark.slow
def test_layers_that_share_are_not_sharded(launched: dict[str, Any]) -> None:
    assert launched["refusal"] == (
        "unsupported distributed setup:\n"
        "  - fsdp: shards every layer with its tensors, and those of layers that share (LoRA-drop) would be in two "
        "shards\n      hint: train with DDP, or without LoRA-drop"
    )


def test_other_ways_of_dividing_are_refused() -> None:
    class State:
        class fsdp_plugin:  # noqa: N801
            fsdp_version = 1

        deepspeed_plugin = object()

    with pytest.raises(TrainingError) as caught:
        check_strategy(State())
    assert str(caught.value) == (
        "unsupported distributed setup:\n"
        "  - fsdp: version 1 flattens adapter and base into one parameter\n"
        "      hint: set version: 2 in fsdp_config\n"
        "  - deepspeed: its shards cannot be put into lorary's checkpoints\n"
        "      hint: use FSDP2"
    )
