"""The launch recipes of `examples/launch`: accelerate reads them, and a sharded run computes what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "examples" / "launch"


def environment(recipe: str) -> dict[str, str]:
    """What `accelerate launch --config_file RECIPE` sets for its processes; the number of GPUs is made up."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(RECIPES / recipe), "-m", "lorary", "train", "my.yaml"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == 2
    found: dict[str, str] = prepare_multi_gpu_env(args)
    return {key: value for key, value in found.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"id": "builtin:base", "dtype": "float32"},
        "method": {"r": 4, "targets": ["q_proj", "down_proj"]},
        "data": {"train": str(data), "validation_split": 0.2, "max_length": 32},
        "training": {"max_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1, "warmup": 0},
    }


def launched(tmp_path: Path, config: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    """The metrics of two processes with a recipe's environment; accelerate's own launcher needs GPUs."""
    out = tmp_path / recipe.partition(".")[0]
    file = tmp_path / "my.yaml"
    file.write_text(dump(config | {"output": str(out)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "lorary", "train", str(file), "--set", "training.batch_size=2"],
        env=os.environ | environment(recipe) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [str(out / "adapter")], "one line, whatever the number of processes"
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(history: Any) -> list[float]:
    return [record[key] for record in history for key in ("loss", "eval_loss", "grad_norm") if key in record]


@pytest.mark.slow
def test_a_sharded_run_computes_what_one_process_does(tmp_path: Path, config: dict[str, Any]) -> None:
    two = launched(tmp_path, config, "fsdp2.yaml")
    alone = config | {"training": config["training"] | {"batch_size": 4}, "output": str(tmp_path / "alone")}
    one = run(from_dict(alone), quiet=True).history
    assert len(numbers(one)) == 6
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)


def test_the_recipes_say_what_they_are_for() -> None:
    sharded, copied = environment("fsdp2.yaml"), environment("ddp.yaml")
    assert sharded["ACCELERATE_USE_FSDP"] == "true"
    assert sharded["FSDP_VERSION"] == "2"
    assert "ACCELERATE_USE_FSDP" not in copied
    page = (ROOT / "docs" / "how-to" / "several-processes.md").read_text()
    for recipe in RECIPES.glob("*.yaml"):
        assert recipe.read_text() in page
        assert recipe.read_text().startswith(
            f"# accelerate launch --config_file {recipe.name} -m lorary train my.yaml\n"
        )
