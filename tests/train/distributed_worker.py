"""One process of a distributed run: `torchrun … distributed_worker.py OUT`.

Trains in each of `MODES` and from a configuration, and writes what the first process saw to OUT/MODE.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

import lorary
from lorary.errors import TrainingError
from lorary.layers.adapted import adapted_layers as layers_of
from lorary.methods.lora_drop import Measured
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.trainer import resume
from tests.train.runs import adapted, dpo, llama, log, rows, sft

torch.set_num_threads(1)

RULES: dict[str, dict[str, Any]] = {  # for four steps
    "adalora": {"target": 2, "start": 1, "final": 1},
    "delta-lora": {"start": 0},
    "o-lora": {"weight": 50.0},
    "o-lora-hard": {"hard": True},
}
MODES = ("ddp", "ddp-shares", "ddp-adalora", "fsdp", "dpo-fsdp", *(f"fsdp-{name}" for name in RULES))

FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}


def train(folder: Path, mode: str, ranks: int) -> dict[str, Any]:
    """16 rows in batches of 4, whatever the number of ranks; the head in chunks of 5 tokens, so that ranks differ."""
    model = _model(mode)
    words: dict[str, Any] = dict(FSDP) if "fsdp" in mode else {}
    if "dpo" in mode:
        t: Any = dpo(folder, model, per_device_train_batch_size=4 // ranks, learning_rate=1e-3, **words)
        t.train_dataset = t.train_dataset.select(range(8))
    else:
        words |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        size = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2}
        t = sft(folder, model, train=rows(16), held_out=rows(5), **size, **words)
    t.head.chunk = 5
    t.train()
    sharded = sum(isinstance(p, DTensor) for p in t.model.parameters())
    found = {"log": log(t), "sharded": sharded, "adapter": _plain(t), "figures": t.rule_report()}
    if "dpo" not in mode:
        found["resumed"] = _resumed(folder, t, words, mode)
    return found


def _ruled(name: str) -> Any:
    """A method with rules; O-LoRA's after a task before."""
    model, method = llama(tie_word_embeddings=False), lorary.method(name.removesuffix("-hard"), r=4, **RULES[name])
    past = []
    if "o-lora" in name:
        first = adapted("o-lora", targets=["all-linear", "lm_head"], model=llama(tie_word_embeddings=False), seed=7)
        for i, layer in enumerate(layers_of(first).values()):
            layer.params["B"].data.normal_(std=0.02, generator=torch.Generator().manual_seed(i))
        past = [lorary.Adapter.of(first)]
    return lorary.attach(model, lorary.plan(model, method, ["all-linear", "lm_head"], after=past), seed=0)


def _model(mode: str) -> Any:
    name = mode.partition("-")[2]
    if name in RULES:
        return _ruled(name)
    if "shares" not in mode:
        model = llama(tie_word_embeddings=False)
        return adapted("lora", "lora+", targets=["all-linear", "lm_head"], model=model)
    model = llama(tie_word_embeddings=False, num_hidden_layers=3)  # of each kind one layer keeps its own, two share
    plan = lorary.plan(model, lorary.method("lora", "lora+", r=4), ["q_proj", "down_proj"])
    learnt = lorary.Importance(tuple(Measured(p.site.name, 1.0, 1.0) for p in plan.sites))
    return lorary.attach(model, lorary.drop_layers(plan, learnt, 0.3), seed=0)


def refusal(folder: Path) -> str:
    """What is said to layers that share and are to be sharded."""
    try:
        sft(folder, _model("shares"), train=rows(4), **FSDP)
    except TrainingError as error:
        return str(error)
    return ""


def _resumed(folder: Path, before: Any, words: dict[str, Any], mode: str) -> dict[str, Any]:
    """The second half again, from the checkpoint after the first."""
    model = _model(mode)
    size = {k: getattr(before.args, k) for k in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    t = sft(folder, model, train=rows(16), held_out=rows(5), **size, **words)
    t.head.chunk = 5
    t.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {"log": log(t), "adapter": _plain(t), "figures": t.rule_report()}


def from_configuration(out: Path, batch_size: int) -> dict[str, Any]:
    """A run of the built-in base with a probe before it, on rows that every process writes alike."""
    data = out / f"data-{os.environ.get('RANK', '0')}.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"id": "builtin:base", "dtype": "float32"},  # in 16 bits a row rounds by how many are beside it
        "method": {"r": 4, "targets": "q_proj, down_proj", "drop": {"threshold": 0.5, "sample": 0.5}},
        "data": {"train": str(data), "validation_split": 0.2, "max_length": 32},
        "training": {"max_steps": 3, "batch_size": batch_size, "gradient_accumulation_steps": 1, "logging_steps": 1},
        "output": str(out / "run"),
    }
    history = run(from_dict(tree), quiet=True).history
    return {"history": history, "probe": json.loads((out / "run" / "importance.json").read_text())}


def _plain(trainer: Any) -> dict[str, Any]:
    """The adapter as it would be saved: without the directions that a rule has masked."""
    adapter = resume.copy_adapter(trainer.unwrapped_model(), trainer.fingerprint).compact()
    return {f"{site}.{role}": t.tolist() for site, roles in adapter.tensors.items() for role, t in roles.items()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for mode in MODES:
        AcceleratorState._reset_state(reset_partial_state=True)  # what accelerate remembers of the last one
        result = train(out / mode, mode, int(os.environ["WORLD_SIZE"]))
        if int(os.environ["RANK"]) == 0:
            (out / f"{mode}.json").write_text(json.dumps(result))
    AcceleratorState._reset_state(reset_partial_state=True)
    del os.environ["ACCELERATE_USE_FSDP"]  # accelerate's own note of the runs before
    ended = from_configuration(out, 2)
    if int(os.environ["RANK"]) == 0:
        (out / "run.json").write_text(json.dumps(ended))
    AcceleratorState._reset_state(reset_partial_state=True)
    said = refusal(out / "refused")
    if int(os.environ["RANK"]) == 0:
        (out / "refusal.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()
