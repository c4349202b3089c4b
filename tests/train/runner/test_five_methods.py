"""Five at once - QLoRA, DoRA, rsLoRA, PiSSA and LoRA+, and a rank for every kind of site - through the whole job."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import lorary
from lorary import builtin
from lorary.layers.adapted import adapted_layers
from lorary.layers.quantized_weight import is_quantized
from lorary.train.trainer import checkpoint
from tests import fresh

CONFIG: dict[str, Any] = {
    "model": "builtin:base",
    "method": {
        "name": ["qlora", "dora", "rslora", "pissa", "lora+"],
        "r": 4,
        "alpha": 4,
        "ranks": {"*.down_proj": 2, "*.q_proj": 6},
        "options": {"ratio": 4},
    },
    "data": {"train": "rows.jsonl", "max_length": 128},
    "training": {
        "max_steps": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lr": 1e-3,
        "save_steps": 2,
    },
}


def _rows() -> str:
    """Forty questions and answers of some thirty tokens, and no two alike."""
    rows = [
        {"prompt": f"def add_{i}(x):\n", "completion": f"    return x + {i}  # and {i * i} more"} for i in range(40)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "rows.jsonl").write_text(_rows())
    (path / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"output": "out"}))
    return path


COMMAND = ["-m", "lorary", "train", "run.yaml"]


def _train(folder: Path, *arguments: str, kill: bool = False) -> int:
    """`lorary train`; or killed as soon as a checkpoint is there."""
    program = fresh.Program(*COMMAND, *arguments, folder=folder)
    if kill:  # the first checkpoint goes when the third comes
        while program.running and not any((folder / "out/checkpoints").glob("checkpoint-[0-9]")):
            time.sleep(0.01)
        program.kill()
    status, _, errors = program.ended()
    assert status in (0, -signal.SIGKILL), errors
    return status


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 69).reshape(2, 32)
    result: torch.Tensor = model.eval()(ids).logits
    return result


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5


@pytest.mark.slow
@pytest.mark.xdist_group(fresh.GROUP)
def test_five_at_once_train_resume_merge_and_reload(tmp_path: Path) -> None:
    straight, killed = _folder(tmp_path / "straight"), _folder(tmp_path / "killed")
    assert _train(straight) == 0
    assert _train(killed, kill=True) == -signal.SIGKILL
    assert not (killed / "out/adapter").exists()
    assert checkpoint.newest(killed / "out/checkpoints")[0] is not None
    assert _train(killed, "--resume") == 0
    one, other = (lorary.load_adapter(folder / "out/adapter") for folder in (straight, killed))
    for site, roles in one.tensors.items():
        assert all(torch.equal(other.tensors[site][role], t) for role, t in roles.items()), site
    ranks = {p.site.name.rpartition(".")[2]: p.r for p in one.sites}
    assert (ranks["down_proj"], ranks["q_proj"], ranks["v_proj"]) == (2, 6, 4)

    before = _logits(builtin.load_model())
    live = lorary.load(builtin.load_model(), straight / "out/adapter")
    assert all(is_quantized(layer.base) for layer in adapted_layers(live).values())
    trained = _logits(live)
    with lorary.disabled(live):
        assert (trained - _logits(live)).abs().max() > 0.01, "training changed nothing"
    assert (trained - before).abs().max() > 0.01
    lorary.merge(live)
    assert not any(map(is_quantized, live.modules()))
    _close(_logits(live), trained)
    live.save_pretrained(tmp_path / "merged")
    _close(_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained)
